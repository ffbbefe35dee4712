#!/usr/bin/env bash
# The boundary between hosts and plugins under valgrind: accesses to memory that is not there, not any more or not yet
# written, and memory that nobody frees.
#
#   tests/memcheck.sh
#
# Needs valgrind, python3 and a compiler of C, and runs what `cargo test --workspace --release` has built. What runs: the tests
# of plugin-api itself, those of a library through its two doors and of plugins and hosts of other versions, and the plugin and
# the host in C with each other. Nothing here computes: valgrind knows no matrix tiles.
set -euo pipefail
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-$PWD/target}"
export CONCEPTLOOM_TESTS_NO_BUILD=1

# The test programs by name, as Cargo tells them.
built=$(cargo test --workspace --release --locked --no-run --message-format=json 2> /dev/null |
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]:
        target = message["target"]
        print(target["name"], message["executable"], target["src_path"])')
# The name of a target, and a part of its path: two crates have an `it`.
program() {
    awk -v name="$1" -v path="/$2/" '$1 == name && index($3, path) { print $2 }' <<< "$built"
}

check() {
    valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
        --num-callers=30 --suppressions=tests/memcheck.supp "$@"
}

check "$(program plugin_api plugin-api)" --quiet --test-threads=1
check "$(program it tests/tests)" --quiet --test-threads=1 contract:: versions::this_plugin_runs_in_a_host_of_1_0 \
    versions::plugins_ languages::a_plugin_in_c_writes languages::errors_and_cancellation
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -std=c11 -g -I plugin-api/include tests/c-plugin/host.c -ldl -o "$work/host"
check "$work/host" "$target/release/libfaulty_plugin.so" Passthrough images
echo "no memory was misused"
