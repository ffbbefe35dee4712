#!/usr/bin/env bash
# What cargo compiles the workspace's crates with under run.sh: the compiler and LLVM's own pass for coverage, as libFuzzer reads
# it. Build scripts run by themselves and have none.
case " $* " in
    *" --crate-name build_script_"*) exec "$@" ;;
    *" --crate-name "*)
        exec "$@" -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
            -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
            -Cllvm-args=-sanitizer-coverage-trace-compares
        ;;
    *) exec "$@" ;;
esac
