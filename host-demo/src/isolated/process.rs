//! This program once more, as a process that is spoken to over a socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame;
use crate::child::{self, Ended};

/// What a process may tell ahead: pictures among it take memory, and one that tells faster than it is heard has to wait.
const MAX_UNHEARD: usize = 16;
/// How long a process may take to end once its socket is closed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A process that tells `R`s.
pub(super) struct Process<R> {
    child: Child,
    to: UnixStream,
    from: Receiver<io::Result<(R, Vec<u8>)>>,
}

/// What is there after a wait.
pub(super) enum Next<R> {
    /// What it told.
    Told(R, Vec<u8>),
    /// Nothing, for so long; never longer than was waited for: this process may have been stopped, and the other with it.
    Silence(Duration),
    /// No more will come; and why, where that is known.
    Gone(Option<String>),
}

impl<R: DeserializeOwned + Send + 'static> Process<R> {
    /// Starts it; its standard input is the socket.
    ///
    /// # Errors
    /// The system starts none.
    pub(super) fn start(command: &mut Command) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
        let (sender, from) = sync_channel(MAX_UNHEARD);
        let mut reader = ours.try_clone()?;
        std::thread::Builder::new()
            .name("isolated".to_owned())
            .spawn(move || {
                loop {
                    let told = match frame::read(&mut reader) {
                        Ok(Some(told)) => Ok(told),
                        Ok(None) => return,
                        Err(error) => Err(error),
                    };
                    let is_last = told.is_err();
                    if sender.send(told).is_err() || is_last {
                        return;
                    }
                }
            })?;
        Ok(Self {
            child,
            to: ours,
            from,
        })
    }

    /// Says something to it.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn say(&self, request: &impl Serialize) -> io::Result<()> {
        frame::write(&mut &self.to, request, &[])
    }

    /// Waits for what it tells.
    pub(super) fn next(&self, wait: Duration) -> Next<R> {
        let asked = Instant::now();
        match self.from.recv_timeout(wait) {
            Ok(Ok((told, bytes))) => Next::Told(told, bytes),
            Ok(Err(error)) => Next::Gone(Some(format!("what it tells cannot be read: {error}"))),
            Err(RecvTimeoutError::Timeout) => Next::Silence(asked.elapsed().min(2 * wait)),
            Err(RecvTimeoutError::Disconnected) => Next::Gone(None),
        }
    }

    /// Ends the process, if it has not ended; how it did, in words.
    pub(super) fn end(mut self) -> String {
        let _ = self.to.shutdown(std::net::Shutdown::Both);
        let started = Instant::now();
        let ended = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break Ended::of(status),
                Ok(None) if started.elapsed() < END_LIMIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) | Err(_) => {
                    let _ = self.child.kill();
                    child::wait_apart(self.child);
                    break Ended::TimedOut;
                }
            }
        };
        match ended {
            Ended::Crashed(how) => how,
            Ended::Code(code) => format!("its process ended with exit code {code}"),
            Ended::TimedOut => "its process went silent".to_owned(),
        }
    }
}
