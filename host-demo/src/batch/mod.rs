//! Many workflows, dealt out to many machines by whatever scheduler there is.
//!
//! Every entry of a manifest becomes a folder of its own, complete or not there, with a `done.json` that says what it
//! was made from. A shard that was killed is run again with `--resume`. Nothing in the folders tells when, where or in
//! how many shards they were made: the tree is the same, byte for byte.

mod done;
mod manifest;
mod shard;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::builtin_nodes::Places;
use crate::cache::Cache;
use crate::catalog::Catalog;
use crate::console::{complain, say, tell_devices};
use crate::events::Observers;
use crate::executor::{self, Job, RunError};
use crate::isolated::IsolationArguments;
use crate::plugin_search::Libraries;
use crate::recorder::Recorder;
use crate::run_folder::{self, Destination, MAX_CUT_SHORT, RunFolder, Tries, write_new};
use crate::terminal::Terminal;
use crate::validate::{Plan, validate};
use crate::workflow_file::Workflow;
use crate::{demo, interrupt};

use done::Done;
use manifest::Entry;
pub(crate) use shard::Shard;

/// What to run.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) manifest: PathBuf,
    pub(crate) shard: Option<Shard>,
    pub(crate) out: PathBuf,
    pub(crate) resume: bool,
    /// Bytes.
    pub(crate) cache_budget: u64,
    pub(crate) disable_metadata: bool,
    pub(crate) libraries: Libraries,
}

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BatchEnd {
    /// Every entry of the shard is there.
    Complete,
    /// Some entry failed.
    Failed,
    /// Ctrl-C, or a signal to end.
    Canceled,
}

/// An entry that can run.
struct Prepared {
    entry: Entry,
    workflow: Workflow,
    plan: Plan,
    /// The folder whose pictures it takes; a key of `catalogs`.
    dir: PathBuf,
    is_done: bool,
}

/// Runs the shard's entries.
///
/// # Errors
/// What keeps any entry from running: everything at once, before the first one runs.
pub(crate) fn run(options: &Options) -> anyhow::Result<BatchEnd> {
    let shard = match options.shard {
        Some(shard) => shard,
        None => Shard::from_environment(|name| std::env::var(name).ok())?,
    };
    let entries = manifest::read(&options.manifest)?;
    let n_all = entries.len();
    let mut catalogs = BTreeMap::new();
    let mut problems = Vec::new();
    let mut prepared = Vec::new();
    for (_, entry) in entries
        .into_iter()
        .enumerate()
        .filter(|(k, _)| shard.has(*k))
    {
        let line = entry.line;
        match prepare(entry, options, &mut catalogs) {
            Ok(entry) => prepared.push(entry),
            Err(found) => problems.extend(
                found
                    .into_iter()
                    .map(|problem| format!("line {line}: {problem}")),
            ),
        }
    }
    if !problems.is_empty() {
        let manifest = options.manifest.display();
        anyhow::bail!(
            "the manifest {manifest} cannot run:\n  {}",
            problems.join("\n  ")
        );
    }
    // All catalogs have the same plugins.
    if let Some(catalog) = catalogs.values().next() {
        tell_devices(&catalog.devices()?);
    }
    let cancel = interrupt::flag()?;
    complain(&format!(
        "shard {shard}: {} of {n_all} entries",
        prepared.len()
    ));
    // Where all is done no entry would do it.
    run_folder::sweep(&options.out);
    put_back_suspects(&mut prepared, &options.out);
    let mut cache = Cache::new(options.cache_budget);
    let (mut n_done, mut n_skipped, mut failed) = (0, 0, Vec::new());
    for (index, one) in prepared.iter().enumerate() {
        if one.is_done {
            n_skipped += 1;
            continue;
        }
        complain(&format!(
            "entry {} of {}: {}",
            index + 1,
            prepared.len(),
            one.entry.id
        ));
        match run_one(one, options, &catalogs[&one.dir], &cancel, &mut cache) {
            Ok(()) => n_done += 1,
            // Another process did it meanwhile.
            Err(_) if is_done_now(one, options, &catalogs[&one.dir]) => n_skipped += 1,
            Err(error) => {
                complain(&format!("error: entry {}: {error:#}", one.entry.id));
                if cancel.load(Ordering::SeqCst) {
                    complain("the same command with --resume goes on where it stopped");
                    return Ok(BatchEnd::Canceled);
                }
                failed.push(one.entry.id.as_str());
            }
        }
    }
    say(&format!(
        "{n_done} done, {n_skipped} were there already, {} failed",
        failed.len()
    ));
    Ok(if failed.is_empty() {
        BatchEnd::Complete
    } else {
        BatchEnd::Failed
    })
}

/// Puts those behind the others that may be what takes every process down.
fn put_back_suspects(prepared: &mut [Prepared], out: &Path) {
    prepared.sort_by_cached_key(|one| {
        let tries = Tries::of(out, &one.entry.id);
        if one.is_done {
            // A kill may have come between.
            tries.forget();
            return false;
        }
        let n_cut_short = tries.n_cut_short();
        let is_suspect = n_cut_short >= MAX_CUT_SHORT;
        if is_suspect {
            complain(&format!(
                "entry {} was cut short {n_cut_short} times; it runs after the others",
                one.entry.id
            ));
        }
        is_suspect
    });
}

fn prepare(
    entry: Entry,
    options: &Options,
    catalogs: &mut BTreeMap<PathBuf, Catalog>,
) -> Result<Prepared, Vec<String>> {
    let one = |problem: String| vec![problem];
    let dir = entry
        .workflow
        .as_deref()
        .and_then(Path::parent)
        .unwrap_or(Path::new(""))
        .to_owned();
    if !catalogs.contains_key(&dir) {
        let catalog =
            catalog(&options.libraries, &dir).map_err(|error| one(format!("{error:#}")))?;
        catalogs.insert(dir.clone(), catalog);
    }
    let catalog = &catalogs[&dir];
    let workflow = match &entry.workflow {
        Some(path) => Workflow::read(path, catalog),
        None => Workflow::parse(demo::NAME, demo::WORKFLOW.as_bytes(), catalog),
    };
    let mut workflow = workflow.map_err(|error| one(error.to_string()))?;
    let mut problems = change(&mut workflow, &entry, catalog);
    let plan = validate(&workflow.graph, catalog).unwrap_or_else(|found| {
        problems.extend(found.iter().map(ToString::to_string));
        Plan::new()
    });
    let hash = done::hash(&workflow, &plan, catalog);
    let is_done =
        is_done(&options.out.join(&entry.id), &hash, options.resume).unwrap_or_else(|problem| {
            problems.push(problem);
            false
        });
    if problems.is_empty() {
        Ok(Prepared {
            entry,
            workflow,
            plan,
            dir,
            is_done,
        })
    } else {
        Err(problems)
    }
}

/// Makes the entry's changes; returns what is wrong with them.
fn change(workflow: &mut Workflow, entry: &Entry, catalog: &Catalog) -> Vec<String> {
    if let Some(seed) = entry.seed {
        workflow.set_seeds(seed, catalog);
    }
    let set = |(target, value): (&String, &Value)| {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        let set = workflow.set(&format!("{target}={text}"), catalog);
        set.err().map(|problem| problem.to_string())
    };
    entry.set.iter().filter_map(set).collect()
}

fn catalog(libraries: &Libraries, dir: &Path) -> anyhow::Result<Catalog> {
    let places = Places::Own {
        workflow_dir: dir.to_owned(),
        input_dir: PathBuf::from("input"),
    };
    Ok(Catalog::new(
        libraries.load(&IsolationArguments::default())?,
        places,
    )?)
}

/// Whether the entry's folder is there, and made from the same.
fn is_done(folder: &Path, hash: &str, resume: bool) -> Result<bool, String> {
    let place = folder.display();
    if !folder.exists() {
        return Ok(false);
    }
    match Done::read(folder) {
        _ if !resume => Err(format!(
            "{place} is there already; go on with --resume, or name another folder with --out"
        )),
        Some(done) if done.hash == hash => Ok(true),
        Some(_) => Err(format!(
            "{place} was made from another workflow, parameters or build; remove it, or name another folder with --out"
        )),
        None => Err(format!(
            "{place} holds something that no batch made; remove it, or name another folder with --out"
        )),
    }
}

/// Whether another process has made the entry meanwhile, of the files as they are now.
fn is_done_now(one: &Prepared, options: &Options, catalog: &Catalog) -> bool {
    let hash = done::hash(&one.workflow, &one.plan, catalog);
    is_done(&options.out.join(&one.entry.id), &hash, true) == Ok(true)
}

fn run_one(
    one: &Prepared,
    options: &Options,
    catalog: &Catalog,
    cancel: &Arc<AtomicBool>,
    cache: &mut Cache,
) -> anyhow::Result<()> {
    let folder = RunFolder::create(&Destination::Exactly(options.out.join(&one.entry.id)))?;
    // Of the files as they are now: others ran before, and may have taken hours.
    let hash = done::hash(&one.workflow, &one.plan, catalog);
    let _trying = Tries::of(&options.out, &one.entry.id).begin();
    let metadata = |json: Value| {
        if options.disable_metadata {
            String::new()
        } else {
            json.to_string()
        }
    };
    let recorder = Arc::new(Recorder::new(folder.path()));
    let work_dirs = folder.work_dirs();
    let job = Job {
        graph: &one.workflow.graph,
        plan: &one.plan,
        catalog,
        output_dir: folder.path(),
        work_dirs: &work_dirs,
        workflow: metadata(one.workflow.document()),
        prompt: metadata(one.workflow.graph.to_api()),
        cancel: cancel.clone(),
        observer: Arc::new(Observers(vec![recorder.clone(), Arc::new(Terminal::new())])),
    };
    executor::run(&job, cache)
        .map_err(|error: RunError| anyhow::anyhow!(folder.after_commit(&error.to_string())))?;
    let document = serde_json::to_vec_pretty(&one.workflow.document())?;
    write_new(&folder.path().join("workflow.json"), &document)?;
    let files = recorder
        .record()
        .files
        .into_iter()
        .map(|(_, path)| path)
        .collect();
    if done::hash(&one.workflow, &one.plan, catalog) != hash {
        complain(&format!(
            "warning: entry {}: a file that it reads was changed while it ran",
            one.entry.id
        ));
    }
    Done::write(folder.path(), &one.entry.id, &hash, files)?;
    folder.commit()?;
    work_dirs.finish();
    Ok(())
}

/// For [`fuzzing`](crate::fuzzing): the list and the `done.json` of a folder, with the bundled workflow for every entry.
pub(crate) fn fuzzed(folder: &Path, catalog: &Catalog) {
    let _ = is_done(folder, "", true);
    let entries = manifest::read(&folder.join("manifest.jsonl")).unwrap_or_default();
    for entry in &entries {
        let workflow = Workflow::parse(demo::NAME, demo::WORKFLOW.as_bytes(), catalog);
        if let Ok(mut workflow) = workflow {
            let _ = change(&mut workflow, entry, catalog);
            let _ = validate(&workflow.graph, catalog);
        }
    }
}
