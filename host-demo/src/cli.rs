//! The command line: arguments to checked requests, results to files, errors to one sentence and an exit code.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand};
use jiff::Timestamp;
use serde_json::Value;

use crate::batch::{self, BatchEnd, Shard};
use crate::builtin_nodes::Places;
use crate::cache;
use crate::catalog::Catalog;
use crate::clock;
use crate::console::{complain, say, tell_devices};
use crate::events::Observers;
use crate::executor::{Job, RunError};
use crate::interrupt::{self, EXIT_CANCELED};
use crate::isolated::{self, Engine, IsolationArguments};
use crate::plugin_search::Libraries;
use crate::recorder::Recorder;
use crate::run_folder::{Destination, RunFolder, WorkDirs};
use crate::terminal::Terminal;
use crate::validate::{Plan, Problem, validate};
use crate::workflow_file::Workflow;
use crate::{check, demo, plugin_search, report, serve};

const EXIT_FAILED: u8 = 1;

/// Runs workflows of Conceptloom's nodes. Without a command: the bundled demo workflow.
#[derive(Debug, Parser)]
#[command(
    name = "host-demo",
    version,
    about,
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    libraries: Libraries,
}

#[derive(Debug, Clone, Default, Args)]
struct CacheArguments {
    /// Most memory that results of nodes are kept in, models too, to not make them again [default: half of the machine's,
    /// or of what this process is limited to]
    #[arg(long, value_name = "MIB")]
    cache_memory: Option<u64>,
}

impl CacheArguments {
    /// In bytes.
    fn budget(&self) -> u64 {
        self.cache_memory
            .map_or_else(cache::default_budget, |mib| mib.saturating_mul(1 << 20))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a workflow: what ComfyUI saves, or its API format
    Run(RunArguments),
    /// Serves ComfyUI's protocol: its editor and its clients drive our nodes
    Serve(ServeArguments),
    /// Runs many workflows, dealt out to many processes or machines
    Batch(BatchArguments),
    /// Lists all nodes and their parameters
    Nodes {
        /// As ComfyUI's /object_info document
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        libraries: Libraries,
    },
    /// Says everything that keeps a workflow from running
    Validate {
        /// The workflow
        file: PathBuf,
        /// Changes a parameter first
        #[arg(long = "set", value_name = "NODE.INPUT=VALUE")]
        set: Vec<String>,
        /// Prints the graph that would run with every parameter, in ComfyUI's API format
        #[arg(long)]
        api: bool,
        #[command(flatten)]
        libraries: Libraries,
    },
    /// Checks a plugin against the contract, for its author: every case of every node in a process of its own
    Check(check::Options),
    #[command(hide = true)]
    CheckUnit(check::UnitOptions),
    /// Loads one library, in a process of its own; only this program calls itself so
    #[command(hide = true)]
    TryPlugin { path: PathBuf },
    /// The process of --isolate; only this program calls itself so
    #[command(hide = true)]
    Worker { setup: String },
    /// With --isolate, the process that is asked about a library; only this program calls itself so
    #[command(hide = true)]
    AskPlugin { path: PathBuf },
}

#[derive(Debug, Clone, Default, Args)]
struct RunArguments {
    /// The workflow; the bundled demo if none is named
    file: Option<PathBuf>,
    /// Changes a parameter; NODE is an id, a class or a title
    #[arg(long = "set", value_name = "NODE.INPUT=VALUE")]
    set: Vec<String>,
    /// Gives all seeds this value
    #[arg(long)]
    seed: Option<u64>,
    /// The run's folder; new or empty [default: a new one in runs/]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Where pictures are looked for besides the workflow's own folder
    #[arg(long, value_name = "FOLDER", default_value = "input")]
    input: PathBuf,
    /// Writes no workflow into pictures and learned concepts
    #[arg(long)]
    disable_metadata: bool,
    #[command(flatten)]
    cache: CacheArguments,
    #[command(flatten)]
    isolation: IsolationArguments,
    #[command(flatten)]
    libraries: Libraries,
}

#[derive(Debug, Clone, Args)]
struct ServeArguments {
    /// The port; 0 takes a free one
    #[arg(long, default_value_t = 8188)]
    port: u16,
    /// The address; any but this machine's own needs --token
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    listen: IpAddr,
    /// What clients have to know to be let in
    #[arg(long, env = "CONCEPTLOOM_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Another name by which clients may call this machine, as host.docker.internal; may be given several times
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// ComfyUI's editor: a folder or a wheel of comfyui-frontend-package [default: the one that Python has installed]
    #[arg(long, value_name = "FOLDER_OR_WHEEL")]
    front_end_root: Option<PathBuf>,
    /// Where pictures, results, workflows and the list of jobs are kept
    #[arg(long, value_name = "FOLDER", default_value = "conceptloom-data")]
    data: PathBuf,
    #[command(flatten)]
    cache: CacheArguments,
    /// Runs the jobs that an earlier server left, instead of holding them
    #[arg(long)]
    resume: bool,
    /// Writes no workflow into pictures and learned concepts
    #[arg(long)]
    disable_metadata: bool,
    #[command(flatten)]
    isolation: IsolationArguments,
    #[command(flatten)]
    libraries: Libraries,
}

#[derive(Debug, Clone, Args)]
struct BatchArguments {
    /// A file with one entry a line: {"id": "name", "workflow": "file.json", "set": {"node.input": value}, "seed": 1}; all
    /// but the id may be left out
    manifest: PathBuf,
    /// The part that this process runs, i from 0 [default: from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, else all]
    #[arg(long, value_name = "i/n")]
    shard: Option<Shard>,
    /// Every entry becomes a folder in it
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Goes on: leaves entries that are complete as they are
    #[arg(long)]
    resume: bool,
    /// Writes no workflow into pictures and learned concepts
    #[arg(long)]
    disable_metadata: bool,
    #[command(flatten)]
    cache: CacheArguments,
    #[command(flatten)]
    libraries: Libraries,
}

/// How a command that did not succeed ended; what there was to say has been said.
struct Ended(u8);

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Self {
        complain(&format!("error: {error:#}"));
        Self(EXIT_FAILED)
    }
}

/// Reads the arguments and does what they ask.
pub(crate) fn main() -> ExitCode {
    // One sentence instead of a trace; nodes are guarded where they are called.
    std::panic::set_hook(Box::new(|_| {}));
    let arguments = Arguments::parse();
    let done = std::panic::catch_unwind(|| dispatch(arguments));
    match done {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Ended(code))) => ExitCode::from(code),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            complain(&format!(
                "error: the host panicked ({text}); this is a fault of the host, please report it"
            ));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<(), Ended> {
    match arguments.command {
        None => run(&RunArguments {
            input: PathBuf::from("input"),
            libraries: arguments.libraries,
            ..RunArguments::default()
        }),
        Some(Command::Run(arguments)) => run(&arguments),
        Some(Command::Batch(arguments)) => {
            let ended = batch::run(&batch::Options {
                manifest: arguments.manifest,
                shard: arguments.shard,
                out: arguments.out,
                resume: arguments.resume,
                cache_budget: arguments.cache.budget(),
                disable_metadata: arguments.disable_metadata,
                libraries: arguments.libraries,
            })?;
            match ended {
                BatchEnd::Complete => Ok(()),
                BatchEnd::Failed => Err(Ended(EXIT_FAILED)),
                BatchEnd::Canceled => Err(Ended(EXIT_CANCELED)),
            }
        }
        Some(Command::Serve(arguments)) => Ok(serve::serve(&serve::Options {
            listen: arguments.listen,
            port: arguments.port,
            token: arguments.token,
            hosts: arguments.allow_host,
            front_end: arguments.front_end_root,
            data: arguments.data,
            cache_budget: arguments.cache.budget(),
            disable_metadata: arguments.disable_metadata,
            resume: arguments.resume,
            libraries: arguments.libraries,
            isolation: arguments.isolation,
        })?),
        Some(Command::Worker { setup }) => Ok(isolated::serve(&setup)?),
        Some(Command::AskPlugin { path }) => Ok(isolated::answer_questions(&path)?),
        Some(Command::Check(options)) => match check::run(&options)? {
            true => Ok(()),
            false => Err(Ended(EXIT_FAILED)),
        },
        Some(Command::TryPlugin { path }) => match plugin_search::try_here(&path) {
            0 => Ok(()),
            code => Err(Ended(code)),
        },
        Some(Command::CheckUnit(options)) => Ok(check::run_one(&options)?),
        Some(Command::Nodes { json, libraries }) => {
            let here = IsolationArguments::default();
            let catalog = catalog(&libraries, &here, Places::default())?;
            if json {
                say(&pretty(&Value::Object(catalog.object_info())));
            } else {
                say(&node_list(&catalog));
            }
            Ok(())
        }
        Some(Command::Validate {
            file,
            set,
            api,
            libraries,
        }) => {
            let arguments = RunArguments {
                file: Some(file),
                set,
                input: PathBuf::from("input"),
                libraries,
                ..RunArguments::default()
            };
            let Prepared {
                catalog,
                workflow,
                plan,
            } = prepare(&arguments)?;
            if api {
                say(&pretty(&catalog.with_defaults(&workflow.graph).to_api()));
            } else {
                say(&format!("{} can run: {} nodes", workflow.name, plan.len()));
            }
            Ok(())
        }
    }
}

fn catalog(
    libraries: &Libraries,
    isolation: &IsolationArguments,
    places: Places,
) -> Result<Catalog, Ended> {
    let catalog = Catalog::new(libraries.load(isolation)?, places);
    Ok(catalog.map_err(anyhow::Error::from)?)
}

/// A workflow that can run.
struct Prepared {
    catalog: Catalog,
    workflow: Workflow,
    plan: Plan,
}

fn prepare(arguments: &RunArguments) -> Result<Prepared, Ended> {
    let file = arguments.file.as_deref();
    let places = Places::Own {
        workflow_dir: file
            .and_then(Path::parent)
            .unwrap_or(Path::new(""))
            .to_owned(),
        input_dir: arguments.input.clone(),
    };
    let catalog = catalog(&arguments.libraries, &arguments.isolation, places)?;
    let workflow = match file {
        Some(file) => Workflow::read(file, &catalog),
        None => Workflow::parse(demo::NAME, demo::WORKFLOW.as_bytes(), &catalog),
    };
    let mut workflow = workflow.map_err(anyhow::Error::from)?;
    let mut problems = Vec::new();
    if let Some(seed) = arguments.seed {
        workflow.set_seeds(seed, &catalog);
    }
    for assignment in &arguments.set {
        problems.extend(workflow.set(assignment, &catalog).err());
    }
    match validate(&workflow.graph, &catalog) {
        Ok(plan) if problems.is_empty() => Ok(Prepared {
            catalog,
            workflow,
            plan,
        }),
        found => {
            problems.extend(found.err().unwrap_or_default());
            tell_problems(&workflow.name, &problems);
            Err(Ended(EXIT_FAILED))
        }
    }
}

fn tell_problems(workflow: &str, problems: &[Problem]) {
    if let [problem] = problems {
        complain(&format!("error: {workflow}: {problem}"));
        return;
    }
    complain(&format!(
        "error: {workflow} cannot run, it has {} problems:",
        problems.len()
    ));
    for problem in problems {
        complain(&format!("  {problem}"));
    }
}

fn run(arguments: &RunArguments) -> Result<(), Ended> {
    let prepared = prepare(arguments)?;
    let devices = prepared.catalog.devices().map_err(anyhow::Error::from)?;
    tell_devices(&devices);
    let started = Timestamp::now();
    let destination = match &arguments.out {
        Some(folder) => Destination::Exactly(folder.clone()),
        None => Destination::Named {
            root: PathBuf::from("runs"),
            name: format!(
                "{}-{}",
                clock::compact(started),
                slug(&prepared.workflow.name)
            ),
        },
    };
    let folder = RunFolder::create(&destination).map_err(anyhow::Error::from)?;
    let cancel = interrupt::flag()?;
    let recorder = Arc::new(Recorder::new(folder.path()));
    let work_dirs = folder.work_dirs();
    let outcome = execute(&prepared, arguments, &folder, &work_dirs, &recorder, cancel);
    if let Err(error) = outcome {
        return Err(tell_run_error(&error, &folder));
    }
    let summary = report::Summary {
        started,
        seconds: recorder.seconds(),
        devices,
    };
    let record = recorder.record();
    report::write(
        &folder,
        &prepared.workflow,
        &prepared.catalog,
        &record,
        &summary,
    )
    .map_err(|error| anyhow!(folder.after_commit(&error.to_string())))?;
    let place = folder.commit().map_err(anyhow::Error::from)?;
    work_dirs.finish();
    say(&format!("{}", place.join(report::FILE_NAME).display()));
    Ok(())
}

fn execute(
    prepared: &Prepared,
    arguments: &RunArguments,
    folder: &RunFolder,
    work_dirs: &WorkDirs,
    recorder: &Arc<Recorder>,
    cancel: Arc<AtomicBool>,
) -> Result<(), RunError> {
    let Prepared {
        catalog,
        workflow,
        plan,
    } = prepared;
    let metadata = |json: Value| {
        if arguments.disable_metadata {
            String::new()
        } else {
            json.to_string()
        }
    };
    let job = Job {
        graph: &workflow.graph,
        plan,
        catalog,
        output_dir: folder.path(),
        work_dirs,
        workflow: metadata(workflow.document()),
        prompt: metadata(workflow.graph.to_api()),
        cancel,
        observer: Arc::new(Observers(vec![recorder.clone(), Arc::new(Terminal::new())])),
    };
    let (isolation, budget) = (&arguments.isolation, arguments.cache.budget());
    let libraries = catalog.plugins().iter().map(|plugin| plugin.path.clone());
    let engine = Engine::new(isolation, budget, libraries.collect(), catalog.places());
    let mut engine = engine.map_err(|error| RunError::Worker(error.to_string()))?;
    engine.run(&job)
}

fn tell_run_error(error: &RunError, folder: &RunFolder) -> Ended {
    match error {
        RunError::Canceled { resumable, .. } => {
            let more = if *resumable {
                "; the same command goes on where it stopped"
            } else {
                ""
            };
            complain(&format!("{error}; nothing was written{more}"));
            Ended(EXIT_CANCELED)
        }
        RunError::Node { .. } | RunError::Crashed { .. } | RunError::Worker(_) => {
            anyhow!(folder.after_commit(&error.to_string())).into()
        }
    }
}

/// A workflow's name as part of a folder's.
fn slug(name: &str) -> String {
    let kept: String = name
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || c == '_' {
                c
            } else {
                '-'
            }
        })
        .take(60)
        .collect();
    let kept = kept.trim_matches('-');
    if kept.is_empty() {
        "run".to_owned()
    } else {
        kept.to_owned()
    }
}

fn pretty(json: &Value) -> String {
    // Of plain values: cannot fail.
    serde_json::to_string_pretty(json).unwrap_or_default()
}

fn node_list(catalog: &Catalog) -> String {
    let mut lines = Vec::new();
    for plugin in catalog.plugins() {
        lines.push(format!(
            "{} {} from {}",
            plugin.name,
            plugin.version,
            plugin.path.display()
        ));
    }
    for node in catalog.descriptors() {
        lines.push(format!("\n{}: {}", node.class, node.description));
        for socket in &node.inputs {
            let optional = if socket.optional { ", optional" } else { "" };
            lines.push(format!(
                "  ← {} ({}{optional}): {}",
                socket.name, socket.port, socket.tooltip
            ));
        }
        for widget in &node.widgets {
            lines.push(format!(
                "    {} = {}: {}",
                widget.name,
                widget.default_value(),
                widget.tooltip
            ));
        }
        for socket in &node.outputs {
            lines.push(format!(
                "  → {} ({}): {}",
                socket.name, socket.port, socket.tooltip
            ));
        }
    }
    lines.join("\n")
}
