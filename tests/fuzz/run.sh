#!/usr/bin/env bash
# The fuzz targets under libFuzzer, guided by coverage, one after the other.
#
#   tests/fuzz/run.sh SECONDS [TARGET...]     each target for so long; without names all of them
#
# Needs a C++ compiler beside Rust. What is ours is compiled anew with LLVM's pass for coverage (`instrumented.sh`); what it depends
# on is that of an ordinary build. What was reached is kept in target/fuzz/corpus. A finding ends its target's run and is left in
# target/fuzz/findings: put it into tests/fuzz/seeds/TARGET under a name that says what it is, and mend its cause.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
work=$target/fuzz
seconds=${1:?how many seconds each target shall run}
shift
[ $# -gt 0 ] || set -- $(ls "$here/seeds")

cd "$root"
mkdir -p "$work/findings"
# The plugin as users have it: it is loaded, not linked.
cargo build --workspace --release --locked --lib --bins --examples
export CONCEPTLOOM_PLUGIN=$target/release/libconceptloom.so
RUSTC_WORKSPACE_WRAPPER=$here/instrumented.sh \
    cargo build --workspace --release --locked --bin fuzz --features fuzz/libfuzzer
# A later ordinary build puts its own there.
cp "$target/release/fuzz" "$work/fuzz"

failed=()
for name in "$@"; do
    mkdir -p "$work/corpus/$name"
    echo "== $name" >&2
    CONCEPTLOOM_FUZZ_TARGET=$name nice -n 19 "$work/fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -malloc_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$work/findings/$name-" \
        "$work/corpus/$name" "$here/seeds/$name" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "findings of ${failed[*]} are in $work/findings" >&2
    exit 1
fi
