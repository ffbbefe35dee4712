//! Jobs: waiting, running, ended. One runs at a time.

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use durable_files::disk;
use parking_lot::{Condvar, Mutex};

use super::ended::{Ended, Outcome, Results};
use super::job::{Job, SavedFile};
use super::journal::{Journal, JournalError};
use super::live::Live;
use crate::clock::now_ms;
use crate::console::complain;

/// Ended jobs that are remembered, of those that ran and of those that did not, and the bytes of what is remembered of them; the last one always is.
const MAX_HISTORY: usize = 256;
const MAX_HISTORY_BYTES: usize = 64 << 20;
/// Numbers of jobs that are counted on from: beyond, `f64` is not exact.
const MAX_COUNTED: f64 = 9e15;

/// The job that runs now.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) job: Arc<Job>,
    pub(crate) cancel: Arc<AtomicBool>,
    /// Who tells of it, once it is there.
    pub(crate) live: Option<Arc<Live>>,
    pub(crate) started_ms: u64,
}

#[derive(Default)]
struct State {
    waiting: Vec<Arc<Job>>,
    running: Option<Running>,
    /// A client wants the running job no more.
    is_unwanted: bool,
    ended: VecDeque<Arc<Ended>>,
    next_number: u64,
    free_cache: bool,
    is_closed: bool,
}

impl State {
    /// Whether a job of this id waits, runs or ended.
    fn knows(&self, id: &str) -> bool {
        self.waiting.iter().any(|job| job.id == id)
            || self
                .running
                .as_ref()
                .is_some_and(|running| running.job.id == id)
            || self.ended.iter().any(|ended| ended.id == id)
    }

    fn remember(&mut self, ended: Ended) {
        // Those that never ran push out none that did.
        let of_its_kind = |other: &Arc<Ended>| other.has_run == ended.has_run;
        if self.ended.iter().filter(|other| of_its_kind(other)).count() >= MAX_HISTORY {
            let oldest = self.ended.iter().position(of_its_kind);
            oldest.and_then(|oldest| self.ended.remove(oldest));
        }
        self.ended.push_back(Arc::new(ended));
        let bytes = |ended: &Arc<Ended>| ended.bytes();
        let mut all: usize = self.ended.iter().map(bytes).sum();
        while all > MAX_HISTORY_BYTES && self.ended.len() > 1 {
            let older = self.ended.iter().take(self.ended.len() - 1);
            let oldest = { older }.position(|ended| !ended.has_run);
            let gone = self.ended.remove(oldest.unwrap_or(0));
            all -= gone.as_ref().map_or(all, bytes);
        }
    }
}

/// All jobs that are known.
pub(crate) struct Jobs {
    pub(crate) running: Option<Running>,
    /// Next first.
    pub(crate) waiting: Vec<Arc<Job>>,
    /// Oldest first.
    pub(crate) ended: Vec<Arc<Ended>>,
}

/// What the worker is to do next.
pub(crate) enum Task {
    Run(Running),
    /// Let all cached results go.
    FreeCache,
    Stop,
}

/// A job is not taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcceptError {
    /// A job of its id waits, runs or ended.
    #[error("prompt_id is that of another job; choose another UUID, or none")]
    Used,
    /// It cannot be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// See the module.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    journal: Mutex<Journal>,
}

impl Queue {
    /// A queue whose `restored` jobs are held.
    pub(crate) fn new(journal: Journal, restored: Vec<Job>) -> Self {
        let next_number = restored
            .iter()
            // A client may have chosen any number.
            .map(|job| job.number.abs())
            .filter(|number| *number < MAX_COUNTED)
            .map(|number| number as u64 + 1)
            .max()
            .unwrap_or(0);
        let hold = |job| {
            Arc::new(Job {
                is_held: true,
                ..job
            })
        };
        let mut waiting: Vec<_> = restored.into_iter().map(hold).collect();
        waiting.sort_by(|a, b| a.order(b));
        let state = State {
            waiting,
            next_number,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            journal: Mutex::new(journal),
        }
    }

    /// Takes a job in once it is on the disk; returns its number. `number` puts it before or behind others, `front`
    /// before all.
    ///
    /// # Errors
    /// See [`AcceptError`].
    pub(crate) fn accept(
        &self,
        mut job: Job,
        number: Option<f64>,
        front: bool,
    ) -> Result<f64, AcceptError> {
        // Held until the job is in the list: else an end could be written before its beginning, or another job take its id.
        let mut journal = self.journal.lock();
        let next = {
            let mut state = self.state.lock();
            if state.knows(&job.id) {
                return Err(AcceptError::Used);
            }
            let next = state.next_number as f64;
            state.next_number += 1;
            next
        };
        job.number = number.unwrap_or(if front { -next } else { next });
        let number = job.number;
        journal.accepted(&job)?;
        let mut state = self.state.lock();
        let place = state
            .waiting
            .partition_point(|other| other.order(&job).is_le());
        state.waiting.insert(place, Arc::new(job));
        self.changed.notify_all();
        Ok(number)
    }

    /// Waits for something to do. A job is running from then on: whoever cancels it finds it here or there.
    pub(crate) fn next(&self) -> Task {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return Task::Stop;
            }
            if std::mem::take(&mut state.free_cache) {
                return Task::FreeCache;
            }
            if let Some(place) = state.waiting.iter().position(|job| !job.is_held) {
                let running = Running {
                    job: state.waiting.remove(place),
                    cancel: Arc::new(AtomicBool::new(false)),
                    live: None,
                    started_ms: now_ms(),
                };
                state.running = Some(running.clone());
                state.is_unwanted = false;
                return Task::Run(running);
            }
            self.changed.wait(&mut state);
        }
    }

    /// Who tells of the running job.
    pub(crate) fn set_live(&self, live: Arc<Live>) {
        if let Some(running) = &mut self.state.lock().running {
            running.live = Some(live);
        }
    }

    /// The worker is done with the running job.
    pub(crate) fn end(&self, ended: Ended) {
        let id = ended.id.clone();
        // Held until the end is written: else one that is accepted under the same id could be ended by it.
        let mut journal = self.journal.lock();
        let mut state = self.state.lock();
        // A server that is being stopped leaves its job for the next start.
        let is_left = state.is_closed && ended.outcome == Outcome::Canceled && !state.is_unwanted;
        state.running = None;
        state.remember(ended);
        drop(state);
        if !is_left {
            write_ended(&mut journal, &[id]);
        } else if let Err(error) = journal.left(&id) {
            complain(&format!("warning: {error}"));
        }
    }

    /// The worker begins a job.
    pub(crate) fn begin(&self, id: &str) {
        if let Err(error) = self.journal.lock().begun(id) {
            complain(&format!(
                "warning: {error}; after a crash the job's files may be there twice"
            ));
        }
    }

    /// The running job has saved a file, besides `others`. Returns where it is: a job that a crash cut short may have saved the
    /// very same already.
    pub(crate) fn saved(&self, job: &Job, path: &Path, others: &[PathBuf]) -> PathBuf {
        let mut file = match SavedFile::of(path) {
            Ok(file) => file,
            Err(error) => {
                complain(&format!(
                    "warning: {} cannot be read: {error}",
                    path.display()
                ));
                return path.to_owned();
            }
        };
        let twin = file.twin_of(&job.cut_short, others);
        if let Some(twin) = twin.filter(|twin| disk::rename(path, twin).is_ok()) {
            file.path = twin;
        }
        let path = file.path.clone();
        if let Err(error) = self.journal.lock().saved(&job.id, file) {
            complain(&format!(
                "warning: {error}; after a crash {} would be there twice",
                path.display()
            ));
        }
        path
    }

    /// Takes waiting jobs out; those that `is_meant` names. Returns how many.
    pub(crate) fn remove_waiting(&self, is_meant: impl Fn(&Job) -> bool) -> usize {
        let mut removed = Vec::new();
        let mut journal = self.journal.lock();
        let mut state = self.state.lock();
        state.waiting.retain(|job| {
            let goes = is_meant(job);
            if goes {
                removed.push(job.clone());
            }
            !goes
        });
        let now = now_ms();
        let ids: Vec<_> = removed.iter().map(|job| job.id.clone()).collect();
        // The others would be forgotten at once.
        for job in &removed[removed.len().saturating_sub(MAX_HISTORY)..] {
            let results = Results {
                started_ms: now,
                ended_ms: now,
                ..Results::default()
            };
            state.remember(Ended {
                has_run: false,
                ..Ended::new(job, Outcome::Canceled, &results)
            });
        }
        drop(state);
        if !ids.is_empty() {
            write_ended(&mut journal, &ids);
        }
        ids.len()
    }

    /// Asks the running job to stop, if it is the one named (or any, if none is). Returns whether it was.
    pub(crate) fn interrupt(&self, id: Option<&str>) -> bool {
        let mut state = self.state.lock();
        let running = state
            .running
            .as_ref()
            .filter(|running| id.is_none_or(|id| id == running.job.id));
        let is_running = running.is_some();
        if let Some(running) = running {
            running.cancel.store(true, Ordering::SeqCst);
        }
        state.is_unwanted |= is_running;
        is_running
    }

    /// Takes these jobs out, or stops the one that runs. Returns whether one of them waited or ran.
    pub(crate) fn cancel(&self, ids: &HashSet<String>) -> bool {
        // In this order: one that begins to run in between is found still.
        let n_waiting = self.remove_waiting(|job| ids.contains(&job.id));
        let is_running = ids.iter().any(|id| self.interrupt(Some(id)));
        n_waiting > 0 || is_running
    }

    /// Lets held jobs run; returns how many.
    pub(crate) fn resume(&self) -> usize {
        let mut state = self.state.lock();
        let held = state.waiting.iter_mut().filter(|job| job.is_held);
        let count = held.map(|job| Arc::make_mut(job).is_held = false).count();
        self.changed.notify_all();
        count
    }

    /// Lets cached results go, as soon as no job runs.
    pub(crate) fn free_cache(&self) {
        self.state.lock().free_cache = true;
        self.changed.notify_all();
    }

    /// Stops the running job and the worker; what waits stays in the journal.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        if let Some(running) = &state.running {
            running.cancel.store(true, Ordering::SeqCst);
        }
        drop(state);
        self.changed.notify_all();
        self.journal.lock().catch_up();
    }

    /// The job that runs.
    pub(crate) fn running(&self) -> Option<Running> {
        self.state.lock().running.clone()
    }

    /// All jobs as they are at one moment: each is there once.
    pub(crate) fn jobs(&self) -> Jobs {
        let state = self.state.lock();
        Jobs {
            running: state.running.clone(),
            waiting: state.waiting.clone(),
            ended: state.ended.iter().cloned().collect(),
        }
    }

    /// How many wait or run.
    pub(crate) fn remaining(&self) -> usize {
        let state = self.state.lock();
        state.waiting.len() + usize::from(state.running.is_some())
    }

    /// The jobs that ended, oldest first.
    pub(crate) fn history(&self) -> Vec<Arc<Ended>> {
        self.state.lock().ended.iter().cloned().collect()
    }

    /// Forgets ended jobs that `is_meant` names.
    pub(crate) fn forget(&self, is_meant: impl Fn(&Ended) -> bool) {
        self.state.lock().ended.retain(|ended| !is_meant(ended));
    }
}

fn write_ended(journal: &mut Journal, ids: &[String]) {
    if let Err(error) = journal.ended(ids) {
        complain(&format!(
            "warning: {error}; after a crash the job would run again"
        ));
    }
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

    fn next_id(queue: &Queue) -> String {
        match queue.next() {
            Task::Run(running) => running.job.id.clone(),
            Task::FreeCache | Task::Stop => panic!("no job"),
        }
    }

    #[test]
    fn jobs_run_in_order_and_the_front_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, restored) = Journal::open(&folder.path().join("queue.jsonl")).unwrap();
        let queue = Queue::new(journal, restored);
        for id in ["a", "b"] {
            queue.accept(job(id), None, false).unwrap();
        }
        queue.accept(job("c"), None, true).unwrap();
        queue.accept(job("d"), Some(0.5), false).unwrap();
        assert_eq!(queue.remove_waiting(|job| job.id == "b"), 1);
        let order = [next_id(&queue), next_id(&queue), next_id(&queue)];
        assert_eq!(order, ["c", "a", "d"]);
        assert!(
            queue.interrupt(Some("d")),
            "a job that was taken can be canceled at once"
        );
        let again = |id: &str| queue.accept(job(id), None, false);
        assert!(matches!(again("b"), Err(AcceptError::Used)), "it ended");
        assert!(matches!(again("d"), Err(AcceptError::Used)), "it runs");
    }

    #[test]
    fn what_is_remembered_is_bounded_in_number_and_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, restored) = Journal::open(&folder.path().join("queue.jsonl")).unwrap();
        let queue = Queue::new(journal, restored);
        let end = |id: String, n: usize| {
            let prompt = serde_json::json!({"x": "y".repeat(n)});
            let job = Job { prompt, ..job(&id) };
            queue.end(Ended::new(&job, Outcome::Completed, &Results::default()));
        };
        for i in 0..MAX_HISTORY + 3 {
            end(format!("small {i}"), 1);
        }
        assert_eq!(queue.history().len(), MAX_HISTORY);
        // Those that never ran push out none that did.
        for i in 0..MAX_HISTORY + 3 {
            queue
                .accept(job(&format!("waiting {i}")), None, false)
                .unwrap();
        }
        queue.remove_waiting(|_| true);
        let n_run = queue.history().iter().filter(|ended| ended.has_run).count();
        assert_eq!(
            (n_run, queue.history().len()),
            (MAX_HISTORY, 2 * MAX_HISTORY)
        );
        for i in 0..5 {
            end(format!("large {i}"), MAX_HISTORY_BYTES / 4);
        }
        let ended = queue.history();
        let ids: Vec<_> = ended.iter().map(|ended| ended.id.clone()).collect();
        assert_eq!(ids, ["large 2", "large 3", "large 4"]);
        queue.accept(job("taken out"), None, false).unwrap();
        queue.remove_waiting(|_| true);
        assert_eq!(queue.history().last().unwrap().id, "taken out");
        end("huge".to_owned(), 2 * MAX_HISTORY_BYTES);
        assert_eq!(queue.history().len(), 1);
    }

    #[test]
    fn a_number_that_a_client_chose_keeps_no_server_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (journal, restored) = Journal::open(&path).unwrap();
        let queue = Queue::new(journal, restored);
        for number in [f64::MAX, -1e300, 1.8446744073709552e19, 7.5] {
            let id = number.to_string();
            queue.accept(job(&id), Some(number), false).unwrap();
        }
        drop(queue);
        let (journal, restored) = Journal::open(&path).unwrap();
        let queue = Queue::new(journal, restored);
        assert_eq!(queue.accept(job("b"), None, false).unwrap(), 8.0);
    }

    #[test]
    fn of_jobs_with_one_id_one_is_taken_in() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, restored) = Journal::open(&folder.path().join("queue.jsonl")).unwrap();
        let queue = Queue::new(journal, restored);
        let start = std::sync::Barrier::new(8);
        let accept = || {
            start.wait();
            queue.accept(job("a"), None, false).is_ok()
        };
        let n = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(accept)).collect();
            let taken = threads.into_iter().map(|thread| thread.join().unwrap());
            taken.filter(|is_taken| *is_taken).count()
        });
        assert_eq!((n, queue.remaining()), (1, 1));
    }

    #[test]
    fn a_job_that_begins_while_it_is_canceled_or_listed_is_not_missed() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, restored) = Journal::open(&folder.path().join("queue.jsonl")).unwrap();
        let queue = Queue::new(journal, restored);
        let work = || {
            while let Task::Run(running) = queue.next() {
                while !running.cancel.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let results = Results::default();
                queue.end(Ended::new(&running.job, Outcome::Canceled, &results));
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(work);
            for n in 0..400 {
                let id = n.to_string();
                queue.accept(job(&id), None, false).unwrap();
                for _ in 0..n % 7 {
                    std::thread::yield_now();
                }
                let jobs = queue.jobs();
                let listed = jobs.waiting.iter().map(|job| job.id.clone());
                let running = jobs.running.map(|running| running.job.id.clone());
                let n_listed = listed.chain(running).filter(|other| *other == id).count();
                let is_canceled = queue.cancel(&HashSet::from([id]));
                if (n_listed, is_canceled) != (1, true) {
                    queue.close();
                    panic!("job {n}: listed {n_listed} times, canceled: {is_canceled}");
                }
            }
            queue.close();
        });
    }

    #[test]
    fn a_job_that_a_client_cancelled_does_not_come_back_with_the_next_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        for (is_cancelled, n_left) in [(true, 0), (false, 1)] {
            let (journal, restored) = Journal::open(&path).unwrap();
            let queue = Queue::new(journal, restored);
            queue.accept(job("a"), None, false).unwrap();
            assert_eq!(next_id(&queue), "a");
            queue.begin("a");
            if is_cancelled {
                assert!(queue.cancel(&HashSet::from(["a".to_owned()])));
            }
            queue.close();
            let results = Results::default();
            queue.end(Ended::new(&job("a"), Outcome::Canceled, &results));
            drop(queue);
            let (_, restored) = Journal::open(&path).unwrap();
            assert_eq!(restored.len(), n_left, "{is_cancelled}");
        }
    }

    #[test]
    fn a_job_that_takes_the_server_down_again_and_again_lets_the_others_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let open = || {
            let (journal, restored) = Journal::open(&path).unwrap();
            let queue = Queue::new(journal, restored);
            queue.resume();
            queue
        };
        let begin_next = |queue: &Queue| {
            let id = next_id(queue);
            queue.begin(&id);
            id
        };
        let queue = open();
        for id in ["stopped", "poison"] {
            queue.accept(job(id), None, false).unwrap();
        }
        drop(queue);
        // Stopped in order as often as anybody likes.
        for _ in 0..5 {
            let queue = open();
            assert_eq!(begin_next(&queue), "stopped");
            queue.close();
            let results = Results::default();
            queue.end(Ended::new(&job("stopped"), Outcome::Canceled, &results));
        }
        let queue = open();
        queue.remove_waiting(|job| job.id == "stopped");
        queue.accept(job("good"), None, false).unwrap();
        drop(queue);
        for _ in 0..3 {
            assert_eq!(begin_next(&open()), "poison");
        }
        let queue = open();
        queue.accept(job("new"), None, false).unwrap();
        queue.accept(job("first"), None, true).unwrap();
        let order = [(); 4].map(|()| next_id(&queue));
        assert_eq!(order, ["first", "good", "new", "poison"]);
    }

    #[test]
    fn what_a_crash_left_is_held_and_new_jobs_go_past_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queue.jsonl");
        let (journal, restored) = Journal::open(&path).unwrap();
        let queue = Queue::new(journal, restored);
        queue.accept(job("a"), None, false).unwrap();
        queue.accept(job("b"), None, false).unwrap();
        // The first was running.
        assert_eq!(next_id(&queue), "a");
        drop(queue);
        let (journal, restored) = Journal::open(&path).unwrap();
        let queue = Queue::new(journal, restored);
        assert_eq!(queue.accept(job("new"), None, false).unwrap(), 2.0);
        assert_eq!(next_id(&queue), "new");
        assert_eq!(queue.resume(), 2);
        assert_eq!([next_id(&queue), next_id(&queue)], ["a", "b"]);
    }
}
