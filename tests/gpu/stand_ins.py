"""Link-time stand-ins for NVIDIA's libraries: static libraries of the functions that cudarc declares, each of which finds the
real one when it is first called.

    python3 stand_ins.py CUDARC_SOURCE WORK_FOLDER LIBRARY_FOLDER

A program that is linked with them starts on a machine without NVIDIA's driver: there every function answers with an error.
"""
import pathlib
import re
import subprocess
import sys

# Name; module of cudarc; the library that is opened; what a function answers where that is missing (any error would do).
LIBRARIES = [
    ("cuda", "driver", "libcuda.so.1", 100),
    ("cublas", "cublas", "libcublas.so.13", 1),
    ("cublasLt", "cublaslt", "libcublasLt.so.13", 1),
    ("curand", "curand", "libcurand.so.10", 203),
    ("nvrtc", "nvrtc", "libnvrtc.so.13", 7),
]

FIND = r"""
#include <dlfcn.h>
#include <stddef.h>
static const char *const names[] = { NAMES };
__attribute__((visibility("hidden"))) void *lazy_LIB_slots[sizeof names / sizeof *names];
static long missing(void) { return CODE; }
__attribute__((visibility("hidden"))) void *lazy_LIB_find(size_t i) {
    /* Counts references and is safe from any thread: to open a library twice does no harm. */
    void *library = dlopen("SONAME", RTLD_NOW | RTLD_GLOBAL), *function = library ? dlsym(library, names[i]) : NULL;
    if (!function) function = (void *)missing;
    __atomic_store_n(&lazy_LIB_slots[i], function, __ATOMIC_RELEASE);
    return function;
}
"""

# Every register that may hold an argument is kept; a call may change %r10 and %r11.
KEPT = "rdi rsi rdx rcx r8 r9 rax r11".split()
FIRST_CALL = "\n".join([
    ".text", ".p2align 4", "lazy_LIB_first:", " push %rbp", " mov %rsp, %rbp",
    *(f" push %{register}" for register in KEPT), " sub $128, %rsp",
    *(f" movups %xmm{i}, {16 * i}(%rsp)" for i in range(8)),
    " mov %r11, %rdi", " call lazy_LIB_find", " mov %rax, %r10",
    *(f" movups {16 * i}(%rsp), %xmm{i}" for i in range(8)), " add $128, %rsp",
    *(f" pop %{register}" for register in reversed(KEPT)), " pop %rbp", " jmp *%r10", ""])
FUNCTION = """.p2align 4
.globl NAME
.type NAME, @function
NAME:
 mov lazy_LIB_slots+OFFSET(%rip), %r11
 test %r11, %r11
 jz 1f
 jmp *%r11
1: mov $INDEX, %r11d
 jmp lazy_LIB_first
.size NAME, .-NAME
"""
NO_EXECUTABLE_STACK = '.section .note.GNU-stack,"",@progbits\n'


def filled(text, **values):
    for key, value in values.items():
        text = text.replace(key, str(value))
    return text


def functions(cudarc, module):
    text = (cudarc / "src" / module / "sys/mod.rs").read_text()
    names = sorted(set(re.findall(r"^pub unsafe fn ((?:cu|nvrtc)\w+)\(", text, re.M)) - {"culib"})
    assert len(names) > 20, f"cudarc's module {module} is not written as expected: {names}"
    return names


def main():
    cudarc, work, libraries = map(pathlib.Path, sys.argv[1:])
    for lib, module, soname, code in LIBRARIES:
        names = functions(cudarc, module)
        find, jumps = work / f"{lib}.c", work / f"{lib}.s"
        find.write_text(filled(FIND, NAMES=", ".join(f'"{name}"' for name in names), LIB=lib, CODE=code, SONAME=soname))
        each = (filled(FUNCTION, NAME=name, LIB=lib, OFFSET=8 * i, INDEX=i) for i, name in enumerate(names))
        jumps.write_text(filled(FIRST_CALL, LIB=lib) + "".join(each) + NO_EXECUTABLE_STACK)
        objects = [f"{source}.o" for source in (find, jumps)]
        for source, compiled in zip((find, jumps), objects):
            subprocess.run(["gcc", "-O2", "-fPIC", "-w", "-c", source, "-o", compiled], check=True)
        subprocess.run(["ar", "rcs", libraries / f"lib{lib}.a", *objects], check=True)


main()
