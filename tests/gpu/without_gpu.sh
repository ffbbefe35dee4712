#!/usr/bin/env bash
# The CUDA build on a machine without a GPU: says so in one sentence and computes nothing, and works when the processor is named.
#
#   tests/gpu/without_gpu.sh PROGRAMS       what unpack.py unpacked
set -euo pipefail
programs=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
run() { "$programs/host-demo" run --out "$1" --set EmLoop.steps=2 --set EmLoop.steps_per_round=2 --set EmLoop.first_timesteps=2 \
    --set EmLoop.timesteps=2 --set EmLoop.joint_steps=0 --set "New pictures.steps=2" 2> "$1.log"; }
unset CONCEPTLOOM_DEVICE CONCEPTLOOM_PLUGIN

if run none; then echo "it ran without a device" >&2; exit 1; fi
cat none.log
[ "$(wc -l < none.log)" = 1 ] && [ ! -e none ]
grep -q '^error: .*the device cuda:0 cannot be used: .*; set CONCEPTLOOM_DEVICE=cpu' none.log

CONCEPTLOOM_DEVICE=cpu run cpu
head -n 1 cpu.log
grep -q '^conceptloom computes on cpu: ' cpu.log
[ -e cpu/report.html ]
