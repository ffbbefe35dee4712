#!/bin/sh
# Ours beside other programs: `compare.sh [python]`, whose packages are those of requirements.txt; about an hour.
set -eu
cd "$(dirname "$0")/../.."
cargo build --release --locked --workspace --lib --examples
for threads in 1 2; do
    "${1:-python3}" tests/reference/compare.py --threads $threads
    echo
    "${1:-python3}" tests/reference/compare.py --threads $threads --shapes sprites --steps 20 --work tokens lora sampling
    echo
done
