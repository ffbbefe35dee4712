#!/bin/sh
# Ours beside PyTorch: `compare.sh [python]`, whose packages are those of requirements.txt; about fifteen minutes.
set -eu
cd "$(dirname "$0")/../.."
cargo build --release --locked --workspace --lib --examples
for threads in 1 2; do
    for model in "sd15 --width 64" "sprites --width 32 --steps 20"; do
        # shellcheck disable=SC2086 # words of an argument list
        "${1:-python3}" tests/reference/compare.py --threads $threads --model $model
        echo
    done
done
