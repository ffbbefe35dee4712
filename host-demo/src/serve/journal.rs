//! Which jobs were accepted and not ended, on disk: what a crash must not lose.
//!
//! A file of JSON lines, `{"accepted": job}`, `{"begun": {"id": …, "at": …}}`, `{"saved": {"id": …, "file": …}}`, `{"left": id}`
//! and `{"ended": id}`; a line counts once it is on the disk. A job that did not end begins anew, and what it had saved is taken
//! back first: it is there once in the end.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use durable_files::{disk, numbered, write_numbered};
use serde::{Deserialize, Serialize};

use super::folders::write_over;
use super::job::{CutShort, Job, SavedFile};
use crate::console::complain;

/// A shorter file is not begun anew.
const LEAST_COMPACTED: u64 = 4 << 20;

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
    Begun {
        id: String,
        at: SystemTime,
    },
    Saved {
        id: String,
        file: SavedFile,
    },
    /// The server was stopped while the job ran, and not by it.
    Left(String),
    Ended(String),
}

/// An open journal.
pub(crate) struct Journal {
    path: PathBuf,
    /// None once the file may be another one: it is opened with the next line.
    file: Option<disk::File>,
    /// Of whole lines.
    bytes: u64,
    /// Behind them there may be a part of a line, or a line that was not confirmed.
    is_torn: bool,
    /// From so many bytes on the file is begun anew: twice as many as it had when it was, so that ended jobs are never more of it
    /// than those that are left, and every line is written anew about once.
    compact_at: u64,
    least_compacted: u64,
    /// Jobs whose end could not be written yet.
    unwritten: Vec<String>,
}

impl Journal {
    /// Opens or makes the file; returns the jobs that were not ended, in the order of their acceptance.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Job>), JournalError> {
        Self::with_least(path, LEAST_COMPACTED)
    }

    fn with_least(path: &Path, least_compacted: u64) -> Result<(Self, Vec<Job>), JournalError> {
        let failed = |error| JournalError {
            path: path.to_owned(),
            error,
        };
        let Read {
            mut waiting,
            n_unreadable,
        } = match File::open(path) {
            Ok(file) => read(file).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Read::default(),
            Err(error) => return Err(failed(error)),
        };
        if n_unreadable > 0 {
            let kept = keep_aside(path).map_err(failed)?;
            complain(&format!(
                "warning: {n_unreadable} lines of the list of jobs cannot be read, and their jobs are not run; the list is kept as {}",
                kept.display()
            ));
        }
        let mut bytes = rewrite(path, &waiting).map_err(failed)?;
        // By the clock of the disk; from here on every file is another job's.
        let now = path.metadata().and_then(|meta| meta.modified());
        let now = now.map_err(failed)?;
        if end_those_begun(&mut waiting, now) {
            bytes = rewrite(path, &waiting).map_err(failed)?;
        }
        let mut journal = Self {
            path: path.to_owned(),
            file: None,
            bytes,
            is_torn: false,
            compact_at: least_compacted.max(2 * bytes),
            least_compacted,
            unwritten: Vec::new(),
        };
        journal.file().map_err(failed)?;
        Ok((journal, waiting))
    }

    /// Writes down that a job was accepted.
    ///
    /// # Errors
    /// See [`JournalError`]; the job then must not be accepted.
    pub(crate) fn accepted(&mut self, job: &Job) -> Result<(), JournalError> {
        self.append(&[Line::Accepted(Box::new(job.clone()))])
    }

    /// Writes down that a job begins.
    ///
    /// # Errors
    /// See [`JournalError`]; a file then may be there twice if the job is cut short.
    pub(crate) fn begun(&mut self, id: &str) -> Result<(), JournalError> {
        // The clock of the disk, whose ticks are coarser: files that the job saves are not older than the line before this.
        let at = self
            .file()
            .and_then(|file| file.inner().metadata())
            .and_then(|meta| meta.modified());
        let (id, at) = (id.to_owned(), at.map_err(|error| self.failed(error))?);
        self.append(&[Line::Begun { id, at }])
    }

    /// Writes down that a job has saved a file.
    ///
    /// # Errors
    /// See [`JournalError`]; the file then is there twice if the job is cut short.
    pub(crate) fn saved(&mut self, id: &str, file: SavedFile) -> Result<(), JournalError> {
        let id = id.to_owned();
        self.append(&[Line::Saved { id, file }])
    }

    /// Writes down that a job is left for the next server.
    ///
    /// # Errors
    /// See [`JournalError`]; the job then counts as cut short.
    pub(crate) fn left(&mut self, id: &str) -> Result<(), JournalError> {
        self.append(&[Line::Left(id.to_owned())])
    }

    /// Writes down that jobs ended.
    ///
    /// # Errors
    /// See [`JournalError`]; the jobs then run again after a crash, unless anything can be written before it.
    pub(crate) fn ended(&mut self, ids: &[String]) -> Result<(), JournalError> {
        self.unwritten.extend_from_slice(ids);
        self.append(&[])?;
        if self.bytes > self.compact_at {
            self.compact();
        }
        Ok(())
    }

    /// Tries once more to write what could not be.
    pub(crate) fn catch_up(&mut self) {
        let _ = self.append(&[]);
    }

    /// Begins the file anew with what has not ended. Where that fails it only stays long.
    fn compact(&mut self) {
        // By what is written: what is accepted meanwhile is in the file, wherever else it is not yet.
        let read = File::open(&self.path).and_then(read);
        let left = read.and_then(|read| {
            if read.n_unreadable > 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // From here on the name may be another file's.
            self.file = None;
            rewrite(&self.path, &read.waiting)
        });
        let bytes = left.unwrap_or(self.bytes);
        self.compact_at = self.least_compacted.max(2 * bytes);
    }

    /// The file, opened if it is not.
    fn file(&mut self) -> io::Result<&mut disk::File> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => {
                let file = disk::File::append(&self.path)?;
                self.bytes = file.inner().metadata()?.len();
                Ok(none.insert(file))
            }
        }
    }

    /// All of the lines or none, behind the ends that are not written yet, and the disk is waited for once.
    fn append(&mut self, lines: &[Line]) -> Result<(), JournalError> {
        let ends = self.unwritten.iter().cloned().map(Line::Ended);
        let ends: Vec<_> = ends.collect();
        let text = text_of(ends.iter().chain(lines)).map_err(|error| self.failed(error))?;
        if text.is_empty() {
            return Ok(());
        }
        self.mend().map_err(|error| self.failed(error))?;
        let written = self.file().and_then(|file| {
            file.write_all(&text)?;
            file.sync()
        });
        if let Err(error) = written {
            self.is_torn = true;
            // Else the next lines would be torn too, or a job run that was refused.
            let _ = self.mend();
            return Err(self.failed(error));
        }
        self.bytes += text.len() as u64;
        self.unwritten.clear();
        Ok(())
    }

    /// Cuts off what a line that failed has left.
    fn mend(&mut self) -> io::Result<()> {
        if self.is_torn {
            // Opened first: then it is known how long it is.
            self.file()?;
            let bytes = self.bytes;
            self.file()?.set_len(bytes)?;
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

/// What a file says.
#[derive(Default)]
struct Read {
    /// In the order of their acceptance.
    waiting: Vec<Job>,
    /// Lines that were confirmed to somebody.
    n_unreadable: usize,
}

/// A line that was torn by a crash was never confirmed to anybody.
fn read(file: File) -> io::Result<Read> {
    // By the number of their line, which is the order of their acceptance.
    let mut waiting: BTreeMap<usize, Job> = BTreeMap::new();
    let mut numbers: HashMap<String, usize> = HashMap::new();
    let mut n_unreadable = 0;
    let mut lines = BufReader::new(file);
    for number in 0.. {
        let mut line = Vec::new();
        lines.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let Ok(line) = serde_json::from_slice(&line) else {
            n_unreadable += 1;
            continue;
        };
        match line {
            Line::Accepted(job) => {
                let before = numbers.insert(job.id.clone(), number);
                before.and_then(|before| waiting.remove(&before));
                waiting.insert(number, *job);
            }
            Line::Begun { id, at } => {
                if let Some(job) = numbers.get(&id).and_then(|number| waiting.get_mut(number)) {
                    job.begun = Some(at);
                }
            }
            Line::Saved { id, file } => {
                if let Some(job) = numbers.get(&id).and_then(|number| waiting.get_mut(number)) {
                    job.saved.push(file);
                }
            }
            Line::Left(id) => {
                if let Some(job) = numbers.get(&id).and_then(|number| waiting.get_mut(number)) {
                    job.begun = None;
                }
            }
            Line::Ended(id) => {
                let number = numbers.remove(&id);
                number.and_then(|number| waiting.remove(&number));
            }
        }
    }
    Ok(Read {
        waiting: waiting.into_values().collect(),
        n_unreadable,
    })
}

/// Of jobs that were begun it is known until when they ran at most. Returns whether there are any.
fn end_those_begun(waiting: &mut [Job], now: SystemTime) -> bool {
    let mut any = false;
    for job in waiting {
        if let Some(begun) = job.begun.take() {
            any = true;
            job.cut_short.push(CutShort { begun, until: now });
        }
    }
    any
}

/// Copies the file beside itself; returns where to.
fn keep_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = numbered(path.with_extension("unreadable"), ".jsonl");
    let content = std::fs::read(path)?;
    write_numbered(aside, |file| file.write_all(&content))
}

/// Begins the file anew; returns its bytes.
fn rewrite(path: &Path, waiting: &[Job]) -> io::Result<u64> {
    let accepted = |job: &Job| Line::Accepted(Box::new(job.clone()));
    let lines: Vec<_> = waiting.iter().map(accepted).collect();
    let text = text_of(&lines)?;
    write_over(path, &text)?;
    Ok(text.len() as u64)
}

fn text_of<'a>(lines: impl IntoIterator<Item = &'a Line>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confined::Root;

    const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

    fn job(id: &str) -> Job {
        Job {
            id: id.to_owned(),
            ..Job::default()
        }
    }

    #[test]
    fn an_end_that_could_not_be_written_is_written_with_the_next_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (mut journal, _) = Journal::with_least(&path, 0).unwrap();
        journal.accepted(&job("a")).unwrap();
        // Begun anew with the next end, and then not to be opened.
        journal.ended(&["nobody".to_owned()]).unwrap();
        let aside = folder.path().join("aside.jsonl");
        std::fs::rename(&path, &aside).unwrap();
        assert!(journal.ended(&["a".to_owned()]).is_err());
        std::fs::rename(&aside, &path).unwrap();
        journal.accepted(&job("a")).unwrap();
        drop(journal);
        let ids = |path: &Path| Journal::open(path).unwrap().1.len();
        assert_eq!(ids(&path), 1, "the one of the same id");
    }

    #[test]
    fn a_list_that_cannot_be_read_whole_is_kept_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (mut journal, _) = Journal::with_least(&path, 0).unwrap();
        journal.accepted(&job("a")).unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"accepted\": of another version}\n")
            .unwrap();
        let whole = std::fs::read(&path).unwrap();
        // Not begun anew: the line would be lost.
        journal.ended(&["nobody".to_owned()]).unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(&whole));
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().1.len(), 1);
        let kept = std::fs::read(folder.path().join("queue.unreadable.jsonl")).unwrap();
        assert!(kept.starts_with(&whole));
        assert_eq!(Journal::open(&path).unwrap().1.len(), 1);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "once");
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
        journal.ended(&["b".to_owned()]).unwrap();
        drop(journal);
        // A crash in the middle of a line.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"accepted\": {\"id\": \"d").unwrap();
        drop(file);
        let (mut journal, waiting) = Journal::open(&path).unwrap();
        let ids: Vec<_> = waiting.iter().map(|job| job.id.as_str()).collect();
        assert_eq!(ids, ["a", "c"]);
        journal.ended(&["a".to_owned(), "c".to_owned()]).unwrap();
        drop(journal);
        assert!(Journal::open(&path).unwrap().1.is_empty());
    }

    #[test]
    fn of_many_jobs_that_end_together_all_are_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (mut journal, _) = Journal::open(&path).unwrap();
        let ids: Vec<String> = (0..50).map(|n| n.to_string()).collect();
        for id in &ids {
            journal.accepted(&job(id)).unwrap();
            journal.begun(id).unwrap();
        }
        let (odd, even): (Vec<_>, Vec<_>) = ids
            .into_iter()
            .partition(|id| id.ends_with(['1', '3', '5', '7', '9']));
        journal.ended(&odd).unwrap();
        // Ids may come again.
        journal.accepted(&job("1")).unwrap();
        drop(journal);
        let waiting = Journal::open(&path).unwrap().1;
        let expected = even.iter().map(String::as_str).chain(["1"]);
        assert!(waiting.iter().map(|job| job.id.as_str()).eq(expected));
        let begun = waiting
            .iter()
            .filter(|job| job.cut_short.len() == 1)
            .count();
        assert_eq!(begun, even.len());
    }

    #[test]
    fn a_journal_of_a_server_that_is_never_idle_stays_short_and_whole() {
        const LEAST: u64 = 2000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (mut journal, _) = Journal::with_least(&path, LEAST).unwrap();
        let ids = |journal: &Path| -> Vec<String> {
            let (_, waiting) = Journal::open(journal).unwrap();
            waiting.into_iter().map(|job| job.id).collect()
        };
        journal.accepted(&job("held")).unwrap();
        journal.begun("held").unwrap();
        for n in 0..500 {
            journal.accepted(&job(&format!("{n} next"))).unwrap();
            if n > 0 {
                journal.ended(&[format!("{} next", n - 1)]).unwrap();
            }
            let bytes = path.metadata().unwrap().len();
            assert!(bytes < LEAST + 1000, "{bytes} after {n}");
        }
        let copy = folder.path().join("copy.jsonl");
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(ids(&copy), ["held", "499 next"]);
        assert_eq!(Journal::open(&copy).unwrap().1[0].cut_short.len(), 1);
        // Begun anew, and then not to be opened: what cannot be written down is not accepted.
        while journal.file.is_some() {
            journal.ended(&["nobody".to_owned()]).unwrap();
        }
        let aside = folder.path().join("aside.jsonl");
        std::fs::rename(&path, &aside).unwrap();
        assert!(journal.accepted(&job("refused")).is_err());
        std::fs::rename(&aside, &path).unwrap();
        journal.accepted(&job("last")).unwrap();
        drop(journal);
        assert_eq!(ids(&path), ["held", "499 next", "last"]);
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
        // What was not written down any more.
        let twin = folder.path().join("b.png");
        std::fs::write(&twin, "a").unwrap();
        // Also when the file was begun anew.
        for _ in 0..2 {
            let (_, waiting) = Journal::open(&path).unwrap();
            assert_eq!(waiting[0].saved, std::slice::from_ref(&saved));
            assert!(waiting[1].saved.is_empty() && waiting[1].cut_short.is_empty());
            let times = &waiting[0].cut_short;
            assert_eq!(times.len(), 1);
            assert_eq!(saved.twin_of(times, &[]).as_ref(), Some(&twin));
            let others = std::slice::from_ref(&twin);
            assert_eq!(saved.twin_of(times, others), None);
            assert_eq!(saved.twin_of(&[], &[]), None);
            // Of another job, before it or since.
            let modify = |time| {
                File::options()
                    .write(true)
                    .open(&twin)
                    .unwrap()
                    .set_modified(time)
            };
            let own = twin.metadata().unwrap().modified().unwrap();
            for other in [times[0].begun - HOUR, times[0].until + HOUR] {
                modify(other).unwrap();
                assert_eq!(saved.twin_of(times, &[]), None);
            }
            modify(own).unwrap();
            std::fs::write(&picture, "b").unwrap();
            assert_eq!(SavedFile::of(&picture).unwrap().twin_of(times, &[]), None);
            std::fs::write(&picture, "a").unwrap();
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
        // The folder of a network goes with it, and no other.
        let unet = output.path().join("concepts/unet");
        std::fs::create_dir_all(&unet).unwrap();
        let files = ["weights", "config.json"].map(|name| unet.join(name));
        let saved = files.map(|file| {
            std::fs::write(&file, "a").unwrap();
            SavedFile::of(&file).unwrap()
        });
        saved[0].take_back(&output);
        assert!(unet.exists());
        saved[1].take_back(&output);
        assert!(!unet.exists());
        let picture = output.path().join("concepts/a.png");
        std::fs::write(&picture, "a").unwrap();
        SavedFile::of(&picture).unwrap().take_back(&output);
        assert_eq!(
            std::fs::read_dir(output.path().join("concepts"))
                .unwrap()
                .count(),
            0
        );
    }
}
