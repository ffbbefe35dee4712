//! What the crate promises, one file per kind of evidence.
//!
//! | file | evidence |
//! | --- | --- |
//! | `oracle` | filters and mean field computed from their definitions, in f64, without any shortcut |
//! | `recorded` | marginals recorded from pydensecrf (`tests/reference/record_crf.py`) |
//! | `properties` | what holds for every picture |
//! | `errors` | every refusal and its sentence |
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests: a failure is a panic, figures are printed"
)]

mod errors;
mod naive;
mod oracle;
mod properties;
mod recorded;
mod scene;
