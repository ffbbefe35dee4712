#!/usr/bin/env bash
# Compiles our own kernels with the real nvcc, for the cards that builds are made for, on a machine without a GPU or a toolkit;
# says what each of them takes, and fails if one spills registers to memory. About a minute, and 0.3 GB for the toolkit.
#
#   tests/gpu/compile_kernels.sh
#
# CUDA_PREFIX is the toolkit (~/.cache/conceptloom-cuda). Needs bash, gcc and python3 with venv, on x86-64.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
prefix=${CUDA_PREFIX:-$HOME/.cache/conceptloom-cuda}
. "$here/toolkit.sh"
work="${CARGO_TARGET_DIR:-$root/target}/gpu/kernels"
rm -rf "$work"
mkdir -p "$work"
cd "$root/plugin/crates/stable-diffusion/kernels"
for capability in 80 90; do
    for source in *.cu; do
        name=${source%.cu}-$capability
        # As build.rs does.
        "$toolkit/bin/nvcc" -std=c++17 -O3 -fatbin "-gencode=arch=compute_$capability,code=[sm_$capability,compute_$capability]" \
            -Xptxas -v -Werror all-warnings -o "$work/$name.fatbin" "$source" > "$work/$name.log" 2>&1 \
            || { cat "$work/$name.log"; exit 1; }
    done
done
python3 - "$work" << 'PYTHON'
import pathlib, re, sys

KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", re.S)
found, spilling = [], []
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    for name, card, stack, stores, loads, registers, rest in KERNEL.findall(log.read_text()):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append((card, name, registers, shared[1] if shared else "0"))
        if int(stack) or int(stores) or int(loads):
            spilling.append(f"{name} for {card}: {stack} bytes of stack, {stores} spilled, {loads} loaded again")
print(f"{'card':6} {'kernel':32} registers  static shared bytes")
for card, name, registers, shared in sorted(found):
    print(f"{card:6} {name:32} {registers:>9}  {shared:>19}")
# 15 kernels and one of each type's attention, 12 of normalizations, 6 of GEGLU.
assert len(found) == 2 * (3 * 16 + 12 + 6), f"{len(found)} kernels"
sys.exit("\n".join(["registers are spilled:", *spilling]) if spilling else 0)
PYTHON
