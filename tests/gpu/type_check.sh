#!/usr/bin/env bash
# Type-checks the CUDA build on a machine without CUDA: `nvcc` is a stand-in that compiles nothing, so this says that
# the Rust of the feature `cuda` is right and nothing about kernels. Nothing is run on a device.
#
#   tests/gpu/type_check.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work="${CARGO_TARGET_DIR:-$root/target}/gpu"
mkdir -p "$work/bin"
cat > "$work/bin/nvcc" << 'NVCC'
#!/bin/sh
# Answers --version; makes an empty file for -o FILE, or DIR/KERNEL.ptx for --output-directory DIR KERNEL.cu.
folder=""
while [ $# -gt 0 ]; do
    case "$1" in
        --version) printf '%s\n' "nvcc: stand-in" "" "" "Cuda compilation tools, release 13.0, V13.0.0" ;;
        -o) : > "$2" ;;
        --output-directory) folder=$2 ;;
        *.cu) [ -z "$folder" ] || : > "$folder/$(basename "$1" .cu).ptx" ;;
    esac
    shift
done
NVCC
chmod +x "$work/bin/nvcc"
cd "$root"
# The selection of clippy's, so that what does not hang on the feature is taken from there.
PATH="$work/bin:$PATH" NVCC="$work/bin/nvcc" CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80 \
    cargo check --workspace --all-targets --release --locked --features plugin/cuda
