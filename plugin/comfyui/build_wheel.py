"""Packs the nodes with library and program as a wheel.

    cargo build --release --locked && python3 plugin/comfyui/build_wheel.py

Takes them from target/release, or from --built FOLDER, and writes dist/conceptloom-….whl, or into --out FOLDER. The
wheel is for this platform and every Python from 3.10 on. On Linux its name says from which glibc on it works, which is
what the two files ask for; a build on an older system works on more.
"""

import argparse
import pathlib
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parent.parent

BINARIES = {
    "win32": ["conceptloom.dll", "host-demo.exe"],
    "darwin": ["libconceptloom.dylib", "host-demo"],
}.get(sys.platform, ["libconceptloom.so", "host-demo"])

PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "conceptloom"
version = "{version}"
description = "Learns a token for every thing in a picture, and its mask: ComfyUI nodes, and a host of its own"
license = "{license}"
license-files = ["LICENSE-*"]
requires-python = ">=3.10"
readme = "README.md"

[project.scripts]
conceptloom = "conceptloom.command:main"

[tool.setuptools]
packages = ["conceptloom"]

[tool.setuptools.package-data]
conceptloom = ["bin/*", "example_workflows/*"]
"""

# What is in it is no Python, so it is for one platform and every Python.
SETUP = """\
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class Binaries(Distribution):
    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", "{platform}" or super().get_tag()[2]


setup(distclass=Binaries, cmdclass=dict(bdist_wheel=Wheel))
"""

# Libraries that are on every Linux with glibc (PEP 600).
ON_EVERY_LINUX = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
# The oldest tag that today's pip knows for every processor.
OLDEST_GLIBC = 17


def asked_of_linux(path):
    """The libraries that a 64-bit ELF file needs, and the versions of symbols that it needs of each."""
    content = path.read_bytes()
    assert content[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit ELF file"
    at, size, count = struct.unpack_from("<Q", content, 0x28) + struct.unpack_from("<HH", content, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, at + i * size) for i in range(count)]
    needed, versions = set(), set()
    for _, kind, _, _, start, length, link, info, _, _ in sections:

        def text(offset):
            begin = sections[link][4] + offset
            return content[begin : content.index(b"\0", begin)].decode()

        if kind == 6:  # SHT_DYNAMIC, of which DT_NEEDED
            entries = struct.iter_unpack("<qQ", content[start : start + length])
            needed.update(text(value) for tag, value in entries if tag == 1)
        if kind == 0x6FFFFFFE:  # SHT_GNU_verneed
            for _ in range(info):
                _, n, _, first, following = struct.unpack_from("<HHIII", content, start)
                place = start + first
                for _ in range(n):
                    name, step = struct.unpack_from("<8xII", content, place)
                    versions.add(text(name))
                    place += step
                start += following
    return needed, versions


def linux_tag(files, machine):
    """The platform tag of PEP 600; empty where a file needs more than glibc and libgcc."""
    newest = OLDEST_GLIBC
    for needed, versions in map(asked_of_linux, files):
        if needed - ON_EVERY_LINUX:
            return ""
        glibc = (version.removeprefix("GLIBC_2.").split(".")[0] for version in versions if version.startswith("GLIBC_2."))
        newest = max([newest, *map(int, glibc)])
    return f"manylinux_2_{newest}_{machine}"



def build(built, out):
    """Returns the wheel's path."""
    missing = [name for name in BINARIES if not (built / name).is_file()]
    if missing:
        sys.exit(f"error: {built} has no {' and no '.join(missing)}; run `cargo build --release --locked`")
    package = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["workspace"]["package"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source, wheels = folder / "source", folder / "wheels"
        shutil.copytree(
            HERE / "conceptloom", source / "conceptloom", ignore=shutil.ignore_patterns("__pycache__", "bin")
        )
        (source / "conceptloom" / "bin").mkdir()
        for name in BINARIES:
            shutil.copy(built / name, source / "conceptloom" / "bin" / name)
        for name in ["LICENSE-MIT", "LICENSE-APACHE"]:
            shutil.copy(REPOSITORY / name, source / name)
        shutil.copy(HERE / "README.md", source / "README.md")
        (source / "pyproject.toml").write_text(PROJECT.format(**package))
        files = [source / "conceptloom" / "bin" / name for name in BINARIES]
        tag = linux_tag(files, platform.machine()) if sys.platform == "linux" else ""
        (source / "setup.py").write_text(SETUP.format(platform=tag))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--wheel-dir", wheels, source], check=True)
        [wheel] = wheels.iterdir()
        out.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(shutil.copy(wheel, out / wheel.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--built", type=pathlib.Path, default=REPOSITORY / "target" / "release", metavar="FOLDER")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "dist", metavar="FOLDER")
    arguments = parser.parse_args()
    print(build(arguments.built, arguments.out))


main()
