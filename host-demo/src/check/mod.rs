//! Checks a library against the contract, for authors of plugins.
//!
//! In reading order: what is checked (`case`), with what (`given`, in `memory` that tells on its users; `listener` is the
//! host), how a node is run (`subject`), and the checks (`library_cases`, `node_cases`, `fuzz`). Every case of every node
//! runs in a process of its own, so that one that crashes or hangs hides none of the others.

mod case;
mod fuzz;
mod given;
mod library_cases;
mod listener;
mod memory;
mod node_cases;
mod subject;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use plugin_api::NodeDescriptor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::child::{self, Ended, Finished};
use crate::console::say;
use crate::executor::WORKER_STACK;
use crate::loader::{self, Plugin};

use case::Case;
use subject::{NotPassed, Outcome, Subject, TRAIL_KEY, Trail};

/// What to check.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// The library
    #[arg(required_unless_present = "list")]
    plugin: Option<PathBuf>,
    /// Lists the cases
    #[arg(long)]
    list: bool,
    /// Only those whose name contains this; names are CASE or CASE:CLASS, as in cancel:EmLoop
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Prints the results as JSON
    #[arg(long)]
    json: bool,
    /// The first seed of random parameters
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Runs all cases in this process, for a debugger: the first crash ends it, and what hangs hangs
    #[arg(long)]
    in_process: bool,
    /// Most time for one case
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    time_limit: u64,
    /// Most time that a node may take to stop; more for machines with other work
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500)]
    cancel_limit: u64,
}

/// One case in a process of its own; only this program calls itself so.
#[derive(Debug, Clone, Args)]
pub(crate) struct UnitOptions {
    plugin: PathBuf,
    case: Case,
    folder: PathBuf,
    #[arg(long)]
    class: Option<String>,
    #[arg(long)]
    seed: u64,
    /// In milliseconds.
    #[arg(long)]
    cancel_limit: u64,
}

/// What a process of one case reports on its last line.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    /// `None` for a case that is passed.
    host_demo_check: Option<NotPassed>,
    /// What the library calls itself, and its classes.
    name: String,
    version: String,
    classes: Vec<String>,
}

/// How a case ended, as the parent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Passed,
    Skipped,
    Failed,
    Crashed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
            Self::Crashed => "crashed",
        }
    }
}

/// A case of a library or of one of its nodes.
struct Unit {
    case: Case,
    class: Option<String>,
}

impl Unit {
    fn name(&self) -> String {
        match &self.class {
            Some(class) => format!("{}:{class}", self.case.name()),
            None => self.case.name().to_owned(),
        }
    }
}

struct Ran {
    unit: Unit,
    status: Status,
    detail: String,
    seconds: f64,
}

/// Checks; whether nothing failed or crashed.
///
/// # Errors
/// The check itself cannot run.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let Some(plugin) = options.plugin.as_deref().filter(|_| !options.list) else {
        let cases = Case::OF_LIBRARY.iter().chain(&Case::OF_NODE);
        for case in cases {
            say(&format!("{:<17} {}", case.name(), case.description()));
        }
        return Ok(true);
    };
    let folder = std::env::temp_dir().join(format!("host-demo-check-{}", std::process::id()));
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("the folder {} cannot be made", folder.display()))?;
    let checked = check(plugin, options, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    let (report, results) = checked?;
    let count = |status| results.iter().filter(|ran| ran.status == status).count();
    let is_good = count(Status::Failed) + count(Status::Crashed) == 0;
    if options.json {
        say(&as_json(plugin, &report, options.seed, &results).to_string());
    } else {
        say(&format!(
            "{} passed, {} failed, {} crashed, {} skipped",
            count(Status::Passed),
            count(Status::Failed),
            count(Status::Crashed),
            count(Status::Skipped)
        ));
    }
    Ok(is_good)
}

fn as_json(plugin: &Path, report: &Report, seed: u64, results: &[Ran]) -> Value {
    let result = |ran: &Ran| {
        json!({
            "case": ran.unit.case.name(), "node": ran.unit.class, "status": ran.status, "detail": ran.detail,
            "seconds": (ran.seconds * 1000.0).round() / 1000.0,
        })
    };
    json!({
        "plugin": plugin, "name": report.name, "version": report.version, "seed": seed,
        "results": results.iter().map(result).collect::<Vec<_>>(),
    })
}

fn check(plugin: &Path, options: &Options, folder: &Path) -> anyhow::Result<(Report, Vec<Ran>)> {
    let mut results = Vec::new();
    let mut tell = |ran: Ran| {
        if !options.json {
            say(&line(&ran));
        }
        results.push(ran);
    };
    let is_wanted = |unit: &Unit| unit.name().contains(&options.only);
    let run = |unit: &Unit| run_unit(plugin, unit, options, folder);
    // What the others hang on, wanted or not.
    let first = Unit {
        case: Case::Loads,
        class: None,
    };
    let (report, status, detail, seconds) = run(&first)?;
    let is_loaded = status == Status::Passed;
    if !is_loaded || is_wanted(&first) {
        tell(Ran {
            unit: first,
            status,
            detail,
            seconds,
        });
    }
    let of_library = Case::OF_LIBRARY
        .iter()
        .skip(1)
        .map(|&case| Unit { case, class: None });
    let of_nodes = report.classes.iter().flat_map(|class| {
        Case::OF_NODE.iter().map(move |&case| Unit {
            case,
            class: Some(class.clone()),
        })
    });
    for unit in of_library.chain(of_nodes).filter(is_wanted) {
        let (status, detail, seconds) = if is_loaded {
            let (_, status, detail, seconds) = run(&unit)?;
            (status, detail, seconds)
        } else {
            (Status::Skipped, "it does not load".to_owned(), 0.0)
        };
        tell(Ran {
            unit,
            status,
            detail,
            seconds,
        });
    }
    Ok((report, results))
}

fn line(ran: &Ran) -> String {
    let mut line = format!("{:<8} {}", ran.status.name(), ran.unit.name());
    if !ran.detail.is_empty() {
        // Of a text: cannot fail.
        let _ = write!(line, ": {}", ran.detail);
    }
    line
}

fn run_unit(
    plugin: &Path,
    unit: &Unit,
    options: &Options,
    folder: &Path,
) -> anyhow::Result<(Report, Status, String, f64)> {
    let options_of_unit = UnitOptions {
        plugin: plugin.to_owned(),
        case: unit.case,
        folder: folder.to_owned(),
        class: unit.class.clone(),
        seed: options.seed,
        cancel_limit: options.cancel_limit,
    };
    let started = Instant::now();
    let (report, status, detail) = if options.in_process {
        let report = on_worker(&options_of_unit, Trail::None)?;
        judged(report)
    } else {
        let mut command = child::own_program().context("this program cannot be found")?;
        command.args(["check-unit", "--seed", &options.seed.to_string()]);
        command.args(["--cancel-limit", &options.cancel_limit.to_string()]);
        if let Some(class) = &unit.class {
            command.arg("--class").arg(class);
        }
        command
            .arg("--")
            .arg(plugin)
            .arg(unit.case.name())
            .arg(folder);
        let limit = Duration::from_secs(options.time_limit);
        let finished = child::run(&mut command, limit);
        of_child(
            finished.context("this program cannot be started again")?,
            limit,
        )
    };
    Ok((report, status, detail, started.elapsed().as_secs_f64()))
}

/// A report with its status and detail.
type Judged = (Report, Status, String);

fn judged(report: Report) -> Judged {
    let (status, detail) = match &report.host_demo_check {
        None => (Status::Passed, String::new()),
        Some(NotPassed::Failed(detail)) => (Status::Failed, detail.clone()),
        Some(NotPassed::Skipped(why)) => (Status::Skipped, why.clone()),
    };
    (report, status, detail)
}

/// What a process of one case says, or what it was at when it ended.
fn of_child(finished: Finished, limit: Duration) -> Judged {
    let lines = || finished.stdout.lines().rev();
    let report = lines().find_map(|line| serde_json::from_str::<Report>(line).ok());
    let trail = lines().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line.get(TRAIL_KEY)?.as_str().map(str::to_owned)
    });
    let when = trail.map_or("when it was loaded".to_owned(), |at| {
        format!("when it {at}")
    });
    let crashed = |how: String| (Report::default(), Status::Crashed, format!("{how} {when}"));
    match (finished.ended, report) {
        (Ended::Code(0), Some(report)) => {
            match (report.host_demo_check.is_some(), panic_in(&finished.stderr)) {
                // Nobody hears of a destructor's panic otherwise.
                (false, Some(panic)) => (
                    report,
                    Status::Failed,
                    format!("a destructor or a thread {panic}"),
                ),
                _ => judged(report),
            }
        }
        (Ended::TimedOut, _) => {
            let detail = format!("it hangs: no end within {} s {when}", limit.as_secs());
            (Report::default(), Status::Failed, detail)
        }
        (Ended::Crashed(how), _) => crashed(how),
        (Ended::Code(code), _) => crashed(format!("it ended the process with exit code {code}")),
    }
}

/// A panic that was told on standard error.
fn panic_in(stderr: &str) -> Option<String> {
    let mut lines = stderr
        .lines()
        .skip_while(|line| !line.contains("panicked at"));
    let place = lines.next()?.split("panicked at").nth(1)?.trim().to_owned();
    let message = lines.next().unwrap_or_default();
    Some(format!("panicked at {place} {message}"))
}

/// The hidden command: one case, here.
///
/// # Errors
/// The check itself cannot run.
pub(crate) fn run_one(options: &UnitOptions) -> anyhow::Result<()> {
    child::without_core_files();
    let report = on_worker(options, Trail::Parent)?;
    say(&format!("\n{}", serde_json::to_string(&report)?));
    Ok(())
}

fn on_worker(options: &UnitOptions, trail: Trail) -> anyhow::Result<Report> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().stack_size(WORKER_STACK);
        let worker = worker
            .spawn_scoped(scope, || report(options, trail))
            .context("the worker thread cannot be started")?;
        let report = worker.join();
        report.map_err(|_| anyhow::anyhow!("the check itself panicked; please report it"))
    })
}

fn report(options: &UnitOptions, trail: Trail) -> Report {
    let started = Instant::now();
    let loaded = loader::load(&options.plugin).map_err(|error| error.to_string());
    let loaded = loaded.and_then(|plugin| {
        let exports = *plugin.here().map_err(|error| error.to_string())?;
        Ok((plugin, exports))
    });
    let (plugin, exports) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            return Report {
                host_demo_check: Some(NotPassed::Failed(error)),
                ..Report::default()
            };
        }
    };
    let subject = Subject {
        plugin: &plugin,
        exports,
        trail,
        seed: options.seed,
        cancel_limit: Duration::from_millis(options.cancel_limit),
        folder: options.folder.clone(),
    };
    let class = options.class.as_deref();
    let node = class.and_then(|class| plugin.nodes.iter().find(|node| node.class == class));
    let outcome = match (options.case, node) {
        (Case::Loads, _) => Ok(()),
        (Case::LoadTime, _) => library_cases::load_time(started),
        (Case::Descriptor, _) => library_cases::descriptor(&subject),
        (Case::UnknownNames, _) => library_cases::unknown_names(&subject),
        (case, Some(node)) => of_node(case, &subject, node),
        (_, None) => Err(NotPassed::Failed(format!(
            "it has no node of the class {}",
            class.unwrap_or_default()
        ))),
    };
    let Plugin {
        name,
        version,
        nodes,
        ..
    } = plugin;
    Report {
        host_demo_check: outcome.err(),
        name,
        version,
        classes: nodes.into_iter().map(|node| node.class).collect(),
    }
}

fn of_node(case: Case, subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    match case {
        Case::Lifecycle => node_cases::lifecycle(subject, node),
        Case::MissingInputs => node_cases::missing_inputs(subject, node),
        Case::WrongInputs => node_cases::wrong_inputs(subject, node),
        Case::WrongParameters => node_cases::wrong_parameters(subject, node),
        Case::ParameterFuzz => fuzz::parameter_fuzz(subject, node),
        Case::Outputs => node_cases::outputs(subject, node),
        Case::InputsUnchanged => node_cases::inputs_unchanged(subject, node),
        Case::Repeatable => node_cases::repeatable(subject, node),
        Case::TwoThreads => node_cases::two_threads(subject, node),
        Case::Cancel => node_cases::cancel(subject, node),
        Case::Progress => node_cases::progress(subject, node),
        Case::References => node_cases::references(subject, node),
        Case::HostFault => node_cases::host_fault(subject, node),
        Case::Loads | Case::LoadTime | Case::Descriptor | Case::UnknownNames => Ok(()),
    }
}
