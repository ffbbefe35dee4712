#!/usr/bin/env bash
# Our nodes in a stand-in for ComfyUI, and the wheel that brings them.
#
#   tests/comfyui/run.sh [PYTEST ARGUMENTS]
#
# Needs python 3.11 or later with venv, and `cargo build --workspace --release` done. Installs everything else below
# target/comfyui. ComfyUI itself is no part of this: stand_in has its interface for nodes, as it is documented.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target="${CARGO_TARGET_DIR:-$root/target}"
work="$target/comfyui"
mkdir -p "$work"
if ! cmp -s "$here/requirements.txt" "$work/venv/installed"; then
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$work/venv/installed"
fi
export BUILT="${BUILT:-$target/release}" PYTHONDONTWRITEBYTECODE=1
exec "$work/venv/bin/python" -m pytest -p no:cacheprovider "$here" "$@"
