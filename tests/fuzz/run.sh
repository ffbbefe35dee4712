#!/usr/bin/env bash
# The fuzz targets under libFuzzer, guided by coverage, one after the other.
#
#   tests/fuzz/run.sh SECONDS [TARGET...]     each target for so long; without names all of them
#
# Needs a C++ compiler. Nothing but a stable compiler is needed beside: coverage is LLVM's own pass. Builds below target/fuzz,
# optimized and with debug assertions. What was reached is kept in target/fuzz/corpus, and a finding stops its target and is
# left in target/fuzz/findings: put it into tests/fuzz/seeds/TARGET under a name that says what it is, and mend its cause.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
work=$target/fuzz
seconds=${1:?how many seconds each target shall run}
shift
[ $# -gt 0 ] || set -- $(ls "$here/seeds")

cd "$root"
# The plugin as users have it: it is loaded, not linked.
cargo build --workspace --release --locked --lib --bins --examples
export CONCEPTLOOM_PLUGIN=$target/release/libconceptloom.so

# --target keeps build scripts and macros out of it.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="--cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares" \
    CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=$work \
    cargo build --workspace --release --locked --bin fuzz --target "$host"

failed=()
for name in "$@"; do
    mkdir -p "$work/corpus/$name" "$work/findings"
    dictionary=()
    [ -e "$here/dictionaries/$name.txt" ] && dictionary=(-dict="$here/dictionaries/$name.txt")
    echo "== $name" >&2
    CONCEPTLOOM_FUZZ_TARGET=$name nice -n 19 "$work/$host/release/fuzz" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=2048 -malloc_limit_mb=2048 -print_final_stats=1 -verbosity=1 "${dictionary[@]}" \
        -artifact_prefix="$work/findings/$name-" "$work/corpus/$name" "$here/seeds/$name" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "findings of ${failed[*]} are in $work/findings" >&2
    exit 1
fi
