//! Child processes that may crash or hang: how they ended, in words.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How often it is looked whether a child has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long what a child said may take to come after its end, and a killed one to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By itself, with this code.
    Code(i32),
    /// The system ended it; why, in words: `segmentation fault`.
    Crashed(String),
    /// It was ended here: it took longer than it may.
    TimedOut,
}

/// What a child left.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) ended: Ended,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// This program once more, with other arguments.
///
/// # Errors
/// The system does not say where the program is.
pub(crate) fn own_program() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.stdin(Stdio::null());
    Ok(command)
}

/// Runs a program for at most `limit`.
///
/// # Errors
/// It cannot be started.
pub(crate) fn run(command: &mut Command, limit: Duration) -> io::Result<Finished> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().map(Heard::listen);
    let stderr = child.stderr.take().map(Heard::listen);
    let ended = if let Some(status) = wait_for(&mut child, limit)? {
        Ended::of(status)
    } else {
        child.kill()?;
        wait_apart(child);
        Ended::TimedOut
    };
    let end = Instant::now() + END_LIMIT;
    Ok(Finished {
        ended,
        stdout: stdout.map(|heard| heard.text(end)).unwrap_or_default(),
        stderr: stderr.map(|heard| heard.text(end)).unwrap_or_default(),
    })
}

/// Waits for the end of a child for at most so long.
fn wait_for(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        let status = child.try_wait()?;
        if status.is_some() || started.elapsed() >= limit {
            return Ok(status);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits for one that was killed; not for ever: one that waits for a disk or a device that is gone does not end either.
pub(crate) fn wait_apart(mut child: Child) {
    if let Ok(None) = wait_for(&mut child, END_LIMIT) {
        std::thread::spawn(move || child.wait());
    }
}

/// What comes through a pipe.
struct Heard(Arc<Mutex<Said>>);

#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    is_whole: bool,
}

impl Heard {
    fn listen(mut pipe: impl Read + Send + 'static) -> Self {
        let said = Arc::new(Mutex::new(Said::default()));
        let heard = Self(said.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match pipe.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // What came before an error is what there is.
                    Ok(0) | Err(_) => break,
                    Ok(n) => said.lock().bytes.extend_from_slice(&buffer[..n]),
                }
            }
            said.lock().is_whole = true;
        });
        heard
    }

    /// What came until its end; or until `end`, if a child of the child still holds the pipe.
    fn text(self, end: Instant) -> String {
        while !self.0.lock().is_whole && Instant::now() < end {
            std::thread::sleep(LOOK_EVERY);
        }
        String::from_utf8_lossy(&self.0.lock().bytes).into_owned()
    }
}

impl Ended {
    /// What the system says of a process that is gone.
    pub(crate) fn of(status: ExitStatus) -> Self {
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Crashed(signal_words(status)),
        }
    }
}

#[cfg(unix)]
fn signal_words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match status.signal() {
        Some(libc::SIGSEGV) => "segmentation fault".to_owned(),
        Some(libc::SIGABRT) => "abort".to_owned(),
        Some(libc::SIGBUS) => "bus error".to_owned(),
        Some(libc::SIGILL) => "illegal instruction".to_owned(),
        Some(libc::SIGFPE) => "arithmetic exception".to_owned(),
        Some(libc::SIGKILL) => "killed, as by a system that runs out of memory".to_owned(),
        Some(other) => format!("signal {other}"),
        None => "ended in an unknown way".to_owned(),
    }
}

#[cfg(not(unix))]
fn signal_words(_: ExitStatus) -> String {
    "ended in an unknown way".to_owned()
}

/// No core files of what is expected to crash.
pub(crate) fn without_core_files() {
    #[cfg(unix)]
    let _ = rlimit::setrlimit(rlimit::Resource::CORE, 0, 0);
}

/// Where memory runs out, the system ends this process before others.
pub(crate) fn first_to_go() {
    const LIKELIER: &str = "500";
    // Where the system knows no such thing it chooses by itself.
    let _ = std::fs::write("/proc/self/oom_score_adj", LIKELIER);
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Finished {
        run(Command::new("sh").args(["-c", script]), limit).unwrap()
    }

    #[test]
    fn how_a_child_ended_is_told_apart() {
        let long = Duration::from_secs(60);
        let done = shell("echo out; echo err >&2; exit 3", long);
        assert_eq!(done.ended, Ended::Code(3));
        assert_eq!((&*done.stdout, &*done.stderr), ("out\n", "err\n"));
        let crashed = |signal: &str| shell(&format!("kill -{signal} $$"), long).ended;
        assert_eq!(
            crashed("SEGV"),
            Ended::Crashed("segmentation fault".to_owned())
        );
        assert_eq!(crashed("ABRT"), Ended::Crashed("abort".to_owned()));
        let hangs = shell("exec sleep 60", Duration::from_millis(50));
        assert_eq!(hangs.ended, Ended::TimedOut);
        // A child of its own that it leaves holds its pipes: nothing waits for that one.
        let started = Instant::now();
        let leaves = shell("echo out; sleep 60 & exit 0", long);
        assert_eq!((leaves.ended, &*leaves.stdout), (Ended::Code(0), "out\n"));
        assert!(started.elapsed() < long / 2);
    }
}
