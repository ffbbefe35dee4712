//! Faults that a test orders: see [`crate::disk`].

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const TRACE: &str = "CONCEPTLOOM_TESTS_TRACE";
const FAULT: &str = "CONCEPTLOOM_TESTS_FAULT";

/// What happens at the operation that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Stop,
    /// A number of the system.
    Error(i32),
}

#[derive(Debug)]
struct Plan {
    trace: PathBuf,
    /// Number of the operation, from 1.
    fault: Option<(usize, Fault)>,
}

fn plan() -> Option<&'static Plan> {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    PLAN.get_or_init(|| {
        let trace = PathBuf::from(std::env::var_os(TRACE)?);
        let fault = std::env::var(FAULT).ok().and_then(|text| parse(&text));
        Some(Plan { trace, fault })
    })
    .as_ref()
}

fn parse(text: &str) -> Option<(usize, Fault)> {
    let (number, kind) = text.split_once(':')?;
    let fault = match kind {
        "STOP" => Fault::Stop,
        "EIO" => Fault::Error(5),
        "EACCES" => Fault::Error(13),
        "ENOSPC" => Fault::Error(28),
        _ => return None,
    };
    Some((number.parse().ok()?, fault))
}

/// Counts an operation that is about to be done; fails or does not return if it is the one that was chosen.
///
/// # Errors
/// The one that was ordered.
pub(crate) fn pass(operation: &str, path: &Path) -> io::Result<()> {
    pass_after(operation, path, || {})
}

/// The same; `half` is done first where the operation is not to succeed.
///
/// # Errors
/// The one that was ordered.
pub(crate) fn pass_after(operation: &str, path: &Path, half: impl FnOnce()) -> io::Result<()> {
    let Some(plan) = plan() else {
        return Ok(());
    };
    let number = count(&plan.trace, operation, path)?;
    match plan.fault {
        Some((at, fault)) if at == number => {
            half();
            match fault {
                Fault::Stop => std::process::abort(),
                Fault::Error(code) => Err(io::Error::from_raw_os_error(code)),
            }
        }
        _ => Ok(()),
    }
}

/// Writes the operation down; its number is that of its line. Processes and libraries have only the file in common.
fn count(trace: &Path, operation: &str, path: &Path) -> io::Result<usize> {
    let mut file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .open(trace)?;
    file.lock()?;
    file.seek(SeekFrom::Start(0))?;
    let mut before = Vec::new();
    file.read_to_end(&mut before)?;
    let number = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    let line = format!("{operation} {}", path.display()).replace('\n', " ");
    writeln!(file, "{line}")?;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read() {
        assert_eq!(parse("17:STOP"), Some((17, Fault::Stop)));
        assert_eq!(parse("3:ENOSPC"), Some((3, Fault::Error(28))));
        for wrong in ["", "17", "x:EIO", "3:EBUSY"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn operations_are_numbered_in_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace");
        assert_eq!(count(&trace, "mkdir", Path::new("a")).unwrap(), 1);
        assert_eq!(count(&trace, "write", Path::new("a\nb")).unwrap(), 2);
        assert_eq!(
            std::fs::read_to_string(&trace).unwrap(),
            "mkdir a\nwrite a b\n"
        );
    }
}
