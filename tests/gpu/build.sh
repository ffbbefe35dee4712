#!/usr/bin/env bash
# Builds the library, the host and what proves them on a GPU with real CUDA kernels, on a machine that has neither a GPU nor
# a CUDA toolkit, and packs them. What is needed comes from PyPI and crates.io. May be called again: it goes on.
#
#   tests/gpu/build.sh [OUT]       OUT (default target/cuda) gets conceptloom-cuda.tar.xz, unpack.py and peers/, wheels for prove.py
#
# Variables:
#   CUDA_PREFIX        the toolkit                 (~/.cache/conceptloom-cuda; 0.3 GB)
#   CARGO_TARGET_DIR   as ever                     (OUT/target; 2 GB)
#   CUDA_COMPUTE_CAP   90 makes code for Hopper alone; 80 makes PTX that any GPU from Ampere on compiles for itself
# Needs bash, gcc, python3 with venv and cargo, on x86-64. Then, on the GPU machine: tests/gpu/prove.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/target/cuda}
prefix=${CUDA_PREFIX:-$HOME/.cache/conceptloom-cuda}
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CARGO_BUILD_JOBS=${CARGO_BUILD_JOBS:-2}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$out/target}
mkdir -p "$out"
out=$(realpath "$out")
. "$here/toolkit.sh"

# What the linker asks for: candle-core builds cudarc for linked libraries, and none of the real ones is needed for that.
cd "$root"
cudarc=$(cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu --features plugin/cuda \
    | python3 -c 'import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(*[os.path.dirname(package["manifest_path"]) for package in packages if package["name"] == "cudarc"])')
cuda=$prefix/cuda
rm -rf "$cuda"
mkdir -p "$cuda/lib64" "$cuda/work"
for part in bin include nvvm; do ln -s "$toolkit/$part" "$cuda/$part"; done
ln -s lib64 "$cuda/lib"
ln -s "$toolkit/lib/libcudart_static.a" "$cuda/lib64/libcudart.a"
python3 "$here/stand_ins.py" "$cudarc" "$cuda/work" "$cuda/lib64"

# In front of nvcc: candle's kernels for quantized models and mixtures of experts, which nothing here calls, are replaced by
# functions that abort. They would take eight minutes and 35 MB.
cat > "$cuda/work/nvcc" << NVCC
#!/bin/bash
for source; do :; done
case "\$source" in
src/moe/*.cu | src/mmq_gguf/*.cu | src/mmvq_gguf.cu)
    while [ "\$1" != -o ]; do shift; done
    { case "\$source" in */moe_gguf.cu)
        echo '#include <stdlib.h>'
        sed -n 's/^ *pub fn \([a-z0-9_]*\)(.*/void \1(void) { abort(); }/p' src/ffi.rs ;;
    esac; } | exec gcc -x c -fPIC -c -o "\$2" - ;;
*) exec "$toolkit/bin/nvcc" "\$@" ;;
esac
NVCC
chmod +x "$cuda/work/nvcc"

# cudaforge, which compiles candle's kernels, takes NVCC and CUDA_COMPUTE_CAP; cudarc CUDA_HOME and CUDARC_CUDA_VERSION.
export NVCC=$cuda/work/nvcc CUDAFORGE_THREADS=$CARGO_BUILD_JOBS
export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDARC_CUDA_VERSION=13000 PATH=$cuda/bin:$PATH
# The build script of candle-kernels does not watch that variable.
if [ "$(cat "$CARGO_TARGET_DIR/compute-cap" 2> /dev/null)" != "$CUDA_COMPUTE_CAP" ] && [ -d "$CARGO_TARGET_DIR/release/build" ]; then
    cargo clean -q --release -p candle-kernels
fi
# Before the build: one that was interrupted goes on.
mkdir -p "$CARGO_TARGET_DIR"
echo "$CUDA_COMPUTE_CAP" > "$CARGO_TARGET_DIR/compute-cap"
# The whole workspace, so that all programs share one build of candle.
nice -n 19 cargo build --workspace --locked --release --features plugin/cuda --message-format=json-render-diagnostics \
    --lib --bin host-demo --example stage_cost --example kernel_cost --test parity > "$out/built.json"
nice -n 19 cargo test --workspace --locked --release --features plugin/cuda --message-format=json-render-diagnostics \
    --lib --no-run | grep '"name":"tensor_bridge"' >> "$out/built.json"

python3 "$here/collect.py" "$out/pack" < "$out/built.json"
strip "$out"/pack/*
nice -n 19 python3 "$here/pack.py" "$out/conceptloom-cuda.tar.xz" "$root" "$out"/pack/*
cp "$here/unpack.py" "$out/"
"$prefix/venv/bin/pip" download -q --no-deps --only-binary=:all: -d "$out/peers" -r "$here/peers.txt"
ls -l "$out/pack" "$out/conceptloom-cuda.tar.xz"

# As on the other machine; where there is no card, that this is said.
rm -rf "$out/unpacked"
python3 "$out/unpack.py" "$out/conceptloom-cuda.tar.xz" "$root" "$out/unpacked"
if [ -e /dev/nvidiactl ]; then
    echo "prove it: tests/gpu/prove.py $out/unpacked --out FOLDER"
else
    "$here/without_gpu.sh" "$out/unpacked"
fi
