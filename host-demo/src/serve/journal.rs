//! Which jobs were accepted and not ended, on disk: what a crash must not lose.
//!
//! A file of JSON lines, `{"accepted": job}` and `{"ended": id}`; a line counts once it is on the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folders::write_over;
use super::job::Job;

/// The file is begun anew when nothing waits and it is longer than this.
const COMPACT_AT: u64 = 4 << 20;

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the list of jobs in {}: {error}", path.display())]
pub(crate) struct JournalError {
    path: PathBuf,
    error: io::Error,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Accepted(Box<Job>),
    Ended(String),
}

/// An open journal.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Journal {
    /// Opens or makes the file; returns the jobs that were not ended, in the order of their acceptance.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Job>), JournalError> {
        let failed = |error| JournalError {
            path: path.to_owned(),
            error,
        };
        let waiting = match File::open(path) {
            Ok(file) => read(file).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        let (file, bytes) = rewrite(path, &waiting).map_err(failed)?;
        let journal = Self {
            path: path.to_owned(),
            file,
            bytes,
        };
        Ok((journal, waiting))
    }

    /// Writes down that a job was accepted.
    ///
    /// # Errors
    /// See [`JournalError`]; the job then must not be accepted.
    pub(crate) fn accepted(&mut self, job: &Job) -> Result<(), JournalError> {
        self.append(&Line::Accepted(Box::new(job.clone())))
    }

    /// Writes down that jobs ended; `is_idle` if none is left.
    ///
    /// # Errors
    /// See [`JournalError`]; the jobs then run again after a crash.
    pub(crate) fn ended(&mut self, ids: &[String], is_idle: bool) -> Result<(), JournalError> {
        for id in ids {
            self.append(&Line::Ended(id.clone()))?;
        }
        if is_idle && self.bytes > COMPACT_AT {
            let (file, bytes) = rewrite(&self.path, &[]).map_err(|error| self.failed(error))?;
            (self.file, self.bytes) = (file, bytes);
        }
        Ok(())
    }

    fn append(&mut self, line: &Line) -> Result<(), JournalError> {
        let mut text = serde_json::to_vec(line).map_err(|error| self.failed(error.into()))?;
        text.push(b'\n');
        let written = self
            .file
            .write_all(&text)
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // What is left of a torn line would tear the next one too.
            let _ = self.file.set_len(self.bytes);
            return Err(self.failed(error));
        }
        self.bytes += text.len() as u64;
        Ok(())
    }

    fn failed(&self, error: io::Error) -> JournalError {
        JournalError {
            path: self.path.clone(),
            error,
        }
    }
}

/// A line that was torn by a crash was never confirmed to anybody.
fn read(file: File) -> io::Result<Vec<Job>> {
    let mut waiting: Vec<Job> = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        match serde_json::from_slice(&line?) {
            Ok(Line::Accepted(job)) => waiting.push(*job),
            Ok(Line::Ended(id)) => waiting.retain(|job| job.id != id),
            Err(_) => {}
        }
    }
    Ok(waiting)
}

fn rewrite(path: &Path, waiting: &[Job]) -> io::Result<(File, u64)> {
    let mut text = Vec::new();
    for job in waiting {
        serde_json::to_writer(&mut text, &Line::Accepted(Box::new(job.clone())))?;
        text.push(b'\n');
    }
    write_over(path, &text)?;
    let file = OpenOptions::new().append(true).open(path)?;
    Ok((file, text.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str) -> Job {
        Job {
            id: id.to_owned(),
            ..Job::default()
        }
    }

    #[test]
    fn what_was_accepted_and_not_ended_is_there_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (mut journal, waiting) = Journal::open(&path).unwrap();
        assert!(waiting.is_empty());
        for id in ["a", "b", "c"] {
            journal.accepted(&job(id)).unwrap();
        }
        journal.ended(&["b".to_owned()], false).unwrap();
        drop(journal);
        // A crash in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"accepted\": {\"id\": \"d").unwrap();
        drop(file);
        let (mut journal, waiting) = Journal::open(&path).unwrap();
        let ids: Vec<_> = waiting.iter().map(|job| job.id.as_str()).collect();
        assert_eq!(ids, ["a", "c"]);
        journal
            .ended(&["a".to_owned(), "c".to_owned()], true)
            .unwrap();
        drop(journal);
        assert!(Journal::open(&path).unwrap().1.is_empty());
    }
}
