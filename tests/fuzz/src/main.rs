//! The targets under libFuzzer, which brings its own `main`: see `run.sh`. `CONCEPTLOOM_FUZZ_TARGET` names the target.
#![cfg_attr(feature = "libfuzzer", no_main)]

#[cfg(feature = "libfuzzer")]
mod under_libfuzzer;

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    let program = std::env::args().next().unwrap_or_default();
    // Without libFuzzer there is nothing to guide it.
    std::io::Write::write_all(
        &mut std::io::stderr(),
        format!(
            "error: {program} was built without libFuzzer; tests/fuzz/run.sh builds and runs it\n"
        )
        .as_bytes(),
    )
    .ok();
    std::process::ExitCode::FAILURE
}
