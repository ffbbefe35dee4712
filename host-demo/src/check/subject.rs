//! What is checked, and running it.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use plugin_api::{ErrorCode, LoadedNode, LoadedPlugin, NodeDescriptor, NodeError, Outputs};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use super::given::{Feeder, Inputs, Place, quick_parameters};
use super::listener::{Behavior, Heard, Record, listener};
use super::memory::Held;
use crate::loader::Plugin;

/// How long a node may take on generated inputs before it is said to take too long for this check.
const LONGEST_RUN: Duration = Duration::from_secs(15);

/// Why a case is not passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "status", content = "detail")]
pub(crate) enum NotPassed {
    /// What the library did that it must not do.
    Failed(String),
    /// What could not be tried, and why.
    Skipped(String),
}

/// How a case ended.
pub(crate) type Outcome = Result<(), NotPassed>;

/// Fails.
pub(crate) fn failed<T>(text: impl Into<String>) -> Result<T, NotPassed> {
    Err(NotPassed::Failed(text.into()))
}

/// Says where a case is, so that a crash can be told with what led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trail {
    /// To the parent process, line by line.
    Parent,
    /// To nobody.
    None,
}

/// The key of lines for the parent process.
pub(crate) const TRAIL_KEY: &str = "host-demo-check-at";

impl Trail {
    /// `text` says what the library did just then: `ran on generated inputs`.
    pub(crate) fn at(self, text: &str) {
        if self == Self::Parent {
            let mut out = std::io::stdout();
            // Without a parent nobody is left to tell.
            // A library may have written half a line.
            let line = json!({TRAIL_KEY: text});
            let _ = writeln!(out, "\n{line}").and_then(|()| out.flush());
        }
    }
}

/// A library under check.
pub(crate) struct Subject<'a> {
    pub(crate) plugin: &'a Plugin,
    pub(crate) exports: LoadedPlugin,
    pub(crate) trail: Trail,
    pub(crate) seed: u64,
    /// Time within which a node stops.
    pub(crate) cancel_limit: Duration,
    /// Nodes may write here.
    pub(crate) folder: PathBuf,
}

/// A run that is over.
pub(crate) struct Ran {
    pub(crate) result: Result<Outputs, NodeError>,
    pub(crate) took: Duration,
    /// From the moment in which the node was asked to stop; nothing if it was done by then.
    pub(crate) took_to_stop: Option<Duration>,
    pub(crate) heard: Heard,
    pub(crate) record: Record,
}

/// Why a node does not run on generated inputs.
pub(crate) enum NotRunnable {
    /// It cannot be made.
    NotMade(NotPassed),
    /// Nothing can be given to it, or it takes too long.
    NotTried(String),
    /// Its own error.
    Refused(NodeError),
}

impl From<NotRunnable> for NotPassed {
    fn from(why: NotRunnable) -> Self {
        let why = match why {
            NotRunnable::NotMade(why) => return why,
            NotRunnable::NotTried(why) => why,
            NotRunnable::Refused(error) => error.message.into_string(),
        };
        Self::Skipped(format!("it does not run on generated inputs: {why}"))
    }
}

/// Parameters and inputs with which a node runs.
pub(crate) struct Runnable {
    pub(crate) parameters: Map<String, Json>,
    with_optional: bool,
    feeder: Feeder,
    /// Its first run.
    pub(crate) ran: Ran,
}

impl Subject<'_> {
    /// The same library, whose nodes write into a folder of this name beside others.
    pub(crate) fn in_folder(&self, name: &str) -> Self {
        Self {
            folder: self.folder.join(name),
            ..*self
        }
    }

    /// A new node.
    ///
    /// # Errors
    /// Its class cannot be made: a failure.
    pub(crate) fn create(&self, class: &str) -> Result<LoadedNode, NotPassed> {
        let made = self.exports.create(class);
        made.map_err(|error| NotPassed::Failed(format!("it cannot be made: {error}")))
    }

    /// A new node that has looked at some parameters without a panic; whatever it found, it may be run with them next.
    ///
    /// # Errors
    /// As [`Self::create`], and for a panic `when` it looked.
    pub(crate) fn create_for(
        &self,
        class: &str,
        text: &str,
        when: &str,
    ) -> Result<LoadedNode, NotPassed> {
        let doing = format!("validated, fingerprinted and ran {when}");
        self.trail.at(&doing);
        let made = self.create(class)?;
        self.no_panic(when, &made.validate(text))?;
        self.no_panic(when, &made.fingerprint(text))?;
        Ok(made)
    }

    /// Runs a node.
    pub(crate) fn run(
        &self,
        node: &mut LoadedNode,
        inputs: Inputs,
        parameters: &Map<String, Json>,
        behavior: Behavior,
    ) -> Ran {
        let text = Json::Object(parameters.clone()).to_string();
        self.run_text(node, inputs, &text, behavior)
    }

    /// [`run`](Self::run) with parameters that may be no JSON.
    pub(crate) fn run_text(
        &self,
        node: &mut LoadedNode,
        inputs: Inputs,
        parameters: &str,
        behavior: Behavior,
    ) -> Ran {
        let (context, record) = listener(behavior, &self.folder);
        let started = Instant::now();
        let result = node.run(inputs, parameters, context);
        let ended = Instant::now();
        let took_to_stop = record
            .cancel_at
            .and_then(|asked| ended.checked_duration_since(asked));
        Ran {
            result,
            took: ended - started,
            took_to_stop,
            heard: record.close(),
            record,
        }
    }

    /// Finds parameters and inputs with which the node runs.
    ///
    /// # Errors
    /// There are none.
    pub(crate) fn runnable(&self, descriptor: &NodeDescriptor) -> Result<Runnable, NotRunnable> {
        let mut feeder = Feeder::default();
        let defaults = descriptor.completed_parameters(&Map::new());
        let mut first_error = None;
        for parameters in [quick_parameters(descriptor), defaults] {
            for with_optional in [false, true] {
                let (place, held) = (Place::Heap, Held::default());
                let inputs = feeder
                    .inputs(self, descriptor, with_optional, place, &held)
                    .map_err(NotRunnable::NotTried)?;
                let mut node = self
                    .create(&descriptor.class)
                    .map_err(NotRunnable::NotMade)?;
                self.trail.at("ran on generated inputs");
                let behavior = Behavior::CancelsAfter(LONGEST_RUN);
                let ran = self.run(&mut node, inputs, &parameters, behavior);
                match &ran.result {
                    Ok(_) => {
                        return Ok(Runnable {
                            parameters,
                            with_optional,
                            feeder,
                            ran,
                        });
                    }
                    Err(error) if error.error_code() == ErrorCode::Canceled => {
                        let seconds = LONGEST_RUN.as_secs();
                        let why = format!("it takes longer than {seconds} s");
                        return Err(NotRunnable::NotTried(why));
                    }
                    Err(error) => {
                        first_error.get_or_insert_with(|| error.clone());
                    }
                }
            }
        }
        Err(first_error.map_or_else(
            || NotRunnable::NotTried(String::new()),
            NotRunnable::Refused,
        ))
    }

    /// What a result must not be, whatever was given.
    ///
    /// # Errors
    /// The node panicked: a failure.
    pub(crate) fn no_panic<T>(
        &self,
        when: &str,
        result: &Result<T, NodeError>,
    ) -> Result<(), NotPassed> {
        match result {
            Err(error) if error.error_code() == ErrorCode::Panicked => {
                failed(format!("{when}: {error}"))
            }
            _ => Ok(()),
        }
    }
}

impl Runnable {
    /// Inputs as those of the first run.
    ///
    /// # Errors
    /// They cannot be made once more: the case is skipped.
    pub(crate) fn inputs(
        &mut self,
        subject: &Subject<'_>,
        descriptor: &NodeDescriptor,
        place: Place,
        held: &Held,
    ) -> Result<Inputs, NotPassed> {
        self.feeder
            .inputs(subject, descriptor, self.with_optional, place, held)
            .map_err(NotPassed::Skipped)
    }
}
