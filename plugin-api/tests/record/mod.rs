//! Files that are written from the source and compared with it.

use std::path::Path;

/// Set to write them anew.
const VARIABLE: &str = "CONTRACT_RECORD";

/// Compares a file of this crate with what it should be, or writes it.
#[track_caller]
pub(crate) fn compare(name: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os(VARIABLE).is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, expected).unwrap();
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    let lines = recorded.lines().zip(expected.lines()).enumerate();
    if let Some((i, (recorded, expected))) = { lines }.find(|(_, (a, b))| a != b) {
        panic!(
            "line {} of {name} is\n  {recorded}\nand should be\n  {expected}\nset {VARIABLE}=1 to write it anew",
            i + 1
        );
    }
    assert!(
        recorded == expected,
        "{name} has another length; set {VARIABLE}=1 to write it anew"
    );
}
