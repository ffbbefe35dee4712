#!/usr/bin/env bash
# The server under the programs that it is made for: ComfyUI's editor in a browser, and ComfyUI's clients.
#
#   tests/editor/run.sh [PYTEST ARGUMENTS]
#
# Needs python 3.11 or later with venv, node 20 or later with npm, Debian's chromium (apt-get install chromium; or name
# another with CHROMIUM), and `cargo build --release` done. Installs everything else below target/editor: Python packages of requirements.txt,
# the two versions of the editor, which no part of this repository is, clients from npm, and one in Rust. Screenshots are left in
# target/editor/screenshots.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work="${CARGO_TARGET_DIR:-$root/target}/editor"
mkdir -p "$work"

chromium=${CHROMIUM:-$(command -v chromium || true)}
if [ -z "$chromium" ]; then
    echo "chromium is not installed; apt-get install chromium, or name one with CHROMIUM=/path/to/it" >&2
    exit 1
fi

python="$work/venv/bin/python"
prepare_python() {
    if ! cmp -s "$here/requirements.txt" "$work/venv/installed"; then
        rm -rf "$work/venv"
        python3 -m venv "$work/venv"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
        cp "$here/requirements.txt" "$work/venv/installed"
    fi
    for version in 1.58.1 1.39.19; do
        if [ ! -e "$work/comfyui_frontend_package-$version-py3-none-any.whl" ]; then
            "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
                "comfyui-frontend-package==$version"
        fi
    done
}

prepare_npm() {
    if ! cmp -s "$here/packages/package-lock.json" "$work/packages/installed"; then
        rm -rf "$work/packages"
        mkdir -p "$work/packages"
        cp "$here/packages/package.json" "$here/packages/package-lock.json" "$work/packages"
        # From there: by --prefix npm finds another package behind a linked folder.
        (cd "$work/packages" && npm ci --silent --ignore-scripts --no-audit --no-fund)
        cp "$here/packages/package-lock.json" "$work/packages/installed"
    fi
}

prepare_rust() {
    CARGO_TARGET_DIR="$work/rucomfyui" cargo build --quiet --locked --manifest-path "$here/rucomfyui/Cargo.toml"
}

# Side by side: two of them wait for the network most of the time. A function in the background stops at its first error.
started=()
for prepare in prepare_python prepare_npm prepare_rust; do
    "$prepare" &
    started+=($!)
done
for one in "${started[@]}"; do
    wait "$one"
done

export CHROMIUM="$chromium" EDITOR_TESTS="$work" PYTHONDONTWRITEBYTECODE=1
export HOST_DEMO="${HOST_DEMO:-${CARGO_TARGET_DIR:-$root/target}/release/host-demo}"
export RUCOMFYUI_CLIENT="$work/rucomfyui/debug/rucomfyui-client"
# Two at a time: a test is a browser or a client that waits for a server that waits for one thread of the model.
exec "$python" -m pytest -p no:cacheprovider -n 2 --dist worksteal "$here" "$@"
