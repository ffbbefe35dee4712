//! Which jobs were accepted and not ended, on disk: what a crash must not lose.
//!
//! A file of JSON lines, `{"accepted": job}`, `{"begun": {"id": …, "at": …}}`, `{"saved": {"id": …, "file": …}}` and
//! `{"ended": id}`; a line counts once it is on the disk. A job that did not end begins anew, and what it had saved is taken
//! back first: it is there once in the end.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use durable_files::disk;
use serde::{Deserialize, Serialize};

use super::folders::write_over;
use super::job::{Job, SavedFile};

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
    Begun { id: String, at: SystemTime },
    Saved { id: String, file: SavedFile },
    Ended(String),
}

/// An open journal.
pub(crate) struct Journal {
    path: PathBuf,
    file: disk::File,
    /// Of whole lines.
    bytes: u64,
    /// Behind them there may be a part of a line, or a line that was not confirmed.
    is_torn: bool,
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
            is_torn: false,
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

    /// Writes down that a job begins.
    ///
    /// # Errors
    /// See [`JournalError`]; a file then may be there twice if the job is cut short.
    pub(crate) fn begun(&mut self, id: &str) -> Result<(), JournalError> {
        // The clock of the disk, whose ticks are coarser: files that the job saves are not older than the line before this.
        let at = self
            .file
            .inner()
            .metadata()
            .and_then(|meta| meta.modified());
        let (id, at) = (id.to_owned(), at.map_err(|error| self.failed(error))?);
        self.append(&Line::Begun { id, at })
    }

    /// Writes down that a job has saved a file.
    ///
    /// # Errors
    /// See [`JournalError`]; the file then is there twice if the job is cut short.
    pub(crate) fn saved(&mut self, id: &str, file: SavedFile) -> Result<(), JournalError> {
        let id = id.to_owned();
        self.append(&Line::Saved { id, file })
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
            (self.file, self.bytes, self.is_torn) = (file, bytes, false);
        }
        Ok(())
    }

    fn append(&mut self, line: &Line) -> Result<(), JournalError> {
        let mut text = serde_json::to_vec(line).map_err(|error| self.failed(error.into()))?;
        text.push(b'\n');
        self.mend().map_err(|error| self.failed(error))?;
        let written = self.file.write_all(&text).and_then(|()| self.file.sync());
        if let Err(error) = written {
            self.is_torn = true;
            // Else the next line would be torn too, or a job run that was refused.
            let _ = self.mend();
            return Err(self.failed(error));
        }
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Cuts off what a line that failed has left.
    fn mend(&mut self) -> io::Result<()> {
        if self.is_torn {
            self.file.set_len(self.bytes)?;
            self.is_torn = false;
        }
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
            Ok(Line::Begun { id, at }) => {
                let job = waiting.iter_mut().find(|job| job.id == id);
                job.into_iter()
                    .for_each(|job| job.begun = job.begun.or(Some(at)));
            }
            Ok(Line::Saved { id, file }) => {
                let job = waiting.iter_mut().find(|job| job.id == id);
                job.into_iter().for_each(|job| job.saved.push(file.clone()));
            }
            Ok(Line::Ended(id)) => waiting.retain(|job| job.id != id),
            Err(_) => {}
        }
    }
    Ok(waiting)
}

fn rewrite(path: &Path, waiting: &[Job]) -> io::Result<(disk::File, u64)> {
    let mut text = Vec::new();
    for job in waiting {
        serde_json::to_writer(&mut text, &Line::Accepted(Box::new(job.clone())))?;
        text.push(b'\n');
    }
    write_over(path, &text)?;
    Ok((disk::File::append(path)?, text.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confined::Root;

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
        let mut file = File::options().append(true).open(&path).unwrap();
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

    #[test]
    fn what_a_job_saved_is_known_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let picture = folder.path().canonicalize().unwrap().join("a.png");
        std::fs::write(&picture, "a").unwrap();
        let (mut journal, _) = Journal::open(&path).unwrap();
        for id in ["a", "b"] {
            journal.accepted(&job(id)).unwrap();
        }
        let saved = SavedFile::of(&picture).unwrap();
        journal.begun("a").unwrap();
        journal.saved("a", saved.clone()).unwrap();
        drop(journal);
        // Also when the file was begun anew.
        for _ in 0..2 {
            let (_, waiting) = Journal::open(&path).unwrap();
            assert_eq!(waiting[0].saved, std::slice::from_ref(&saved));
            assert!(waiting[1].saved.is_empty() && waiting[1].begun.is_none());
            // What was not written down any more.
            let twin = folder.path().join("b.png");
            std::fs::write(&twin, "a").unwrap();
            let begun = waiting[0].begun.unwrap();
            assert_eq!(saved.twin_since(begun, &[]).as_ref(), Some(&twin));
            let others = std::slice::from_ref(&twin);
            assert_eq!(saved.twin_since(begun, others), None);
            let later = begun + std::time::Duration::from_secs(3600);
            assert_eq!(saved.twin_since(later, &[]), None);
            std::fs::write(&twin, "b").unwrap();
            assert_eq!(saved.twin_since(begun, &[]), None);
        }
        let output = Root::create(folder.path()).unwrap();
        let of_another = Root::create(&folder.path().join("copy")).unwrap();
        std::fs::write(&picture, "of somebody").unwrap();
        saved.take_back(&output);
        assert!(picture.exists());
        std::fs::write(&picture, "a").unwrap();
        saved.take_back(&of_another);
        assert!(picture.exists());
        saved.take_back(&output);
        assert!(!picture.exists());
    }
}
