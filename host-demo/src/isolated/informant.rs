//! What a host asks a plugin beside running it - what its nodes are, whether parameters are right, where it computes -
//! asked of a process of its own, so that the host never has the library in itself. A process that is lost over a question
//! loses that question; the next one gets a new process.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use plugin_api::{DeviceDescriptor, NodeDescriptor};
use serde::{Deserialize, Serialize};

use super::frame::{self, ErrorText};
use super::process::{Next, Process};
use crate::loader::{self, Plugin};
use crate::{child, interrupt};

/// Most time for an answer. Looking at parameters takes less than a second, opening devices some.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often silence is counted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Validate { class: String, parameters: String },
    Devices,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Told once, first.
    Loaded(Box<Facts>),
    /// Told instead; why.
    NotLoaded(String),
    Validated(Result<(), ErrorText>),
    Devices(Result<Vec<DeviceDescriptor>, String>),
}

/// What a loaded plugin says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) build: String,
    pub(crate) path: PathBuf,
    pub(crate) nodes: Vec<NodeDescriptor>,
}

/// The host's side.
pub(crate) struct Informant {
    path: PathBuf,
    process: Mutex<Option<Process<Answer>>>,
}

impl Informant {
    /// Loads a library in a process of its own.
    ///
    /// # Errors
    /// Why it cannot be loaded, or how its process was lost over it.
    pub(crate) fn start(path: &Path) -> Result<(Self, Facts), String> {
        let (process, facts) = loaded(path)?;
        let informant = Self {
            path: path.to_owned(),
            process: Mutex::new(Some(process)),
        };
        Ok((informant, facts))
    }

    /// Lets a new node of this class look at parameters.
    ///
    /// # Errors
    /// The outer one: how the process was lost; the inner one: the node's.
    pub(crate) fn validate(
        &self,
        class: &str,
        parameters: String,
    ) -> Result<Result<(), ErrorText>, String> {
        let class = class.to_owned();
        match self.ask(&Question::Validate { class, parameters })? {
            Answer::Validated(found) => Ok(found),
            other => Err(unexpected(&other)),
        }
    }

    /// The devices that the plugin computes on.
    ///
    /// # Errors
    /// How the process was lost, or the plugin's own sentence.
    pub(crate) fn devices(&self) -> Result<Vec<DeviceDescriptor>, String> {
        match self.ask(&Question::Devices)? {
            Answer::Devices(found) => found,
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, question: &Question) -> Result<Answer, String> {
        let mut place = self.process.lock();
        let process = match place.take() {
            Some(process) if process.say(question).is_ok() => process,
            // None since the last one was lost, or one that ended between two questions.
            gone => {
                if let Some(process) = gone {
                    process.end();
                }
                let (process, _) = loaded(&self.path)?;
                process.say(question).map_err(|error| error.to_string())?;
                process
            }
        };
        match answer(&process) {
            Ok(answer) => {
                *place = Some(process);
                Ok(answer)
            }
            Err(how) => Err(lost(process, how)),
        }
    }
}

impl Drop for Informant {
    fn drop(&mut self) {
        if let Some(process) = self.process.get_mut().take() {
            process.end();
        }
    }
}

fn loaded(path: &Path) -> Result<(Process<Answer>, Facts), String> {
    let started = child::own_program()
        .and_then(|mut command| Process::start(command.arg("ask-plugin").arg("--").arg(path)));
    let process = started.map_err(|error| format!("it cannot be tried ({error})"))?;
    match answer(&process) {
        Ok(Answer::Loaded(facts)) => Ok((process, *facts)),
        Ok(Answer::NotLoaded(why)) => {
            process.end();
            Err(why)
        }
        Ok(other) => Err(unexpected(&other)),
        Err(how) => Err(lost(process, how)),
    }
}

/// The next answer.
///
/// # Errors
/// There is none; why, where that is known.
fn answer(process: &Process<Answer>) -> Result<Answer, Option<String>> {
    let mut silence = Duration::ZERO;
    loop {
        match process.next(LOOK_EVERY) {
            Next::Told(answer, _) => return Ok(answer),
            Next::Gone(how) => return Err(how),
            Next::Silence(time) => silence += time,
        }
        if silence >= ANSWER_LIMIT {
            let seconds = ANSWER_LIMIT.as_secs();
            return Err(Some(format!("no answer within {seconds} s")));
        }
    }
}

fn lost(process: Process<Answer>, how: Option<String>) -> String {
    let ended = process.end();
    format!("it took its process down ({})", how.unwrap_or(ended))
}

fn unexpected(answer: &Answer) -> String {
    format!("its process answers something else: {answer:?}")
}

/// The other side, the hidden command: answers what the host asks over this process's standard input. It ends with the
/// host.
///
/// # Errors
/// What keeps it from working.
pub(super) fn answer_questions(path: &Path) -> anyhow::Result<()> {
    child::without_core_files();
    interrupt::leave_to_parent()?;
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let mut socket = UnixStream::from(stdin.context("there is no socket of a host")?);
    let questions = questions(socket.try_clone()?)?;
    let plugin = match loader::load(path) {
        Ok(plugin) => plugin,
        Err(error) => {
            let answer = Answer::NotLoaded(error.reason().to_owned());
            return Ok(frame::write(&mut socket, &answer, &[])?);
        }
    };
    let facts = Facts {
        name: plugin.name.clone(),
        version: plugin.version.clone(),
        build: plugin.build.clone(),
        path: plugin.path.clone(),
        nodes: plugin.nodes.clone(),
    };
    frame::write(&mut socket, &Answer::Loaded(Box::new(facts)), &[])?;
    for question in questions {
        frame::write(&mut socket, &answered(&plugin, question), &[])?;
    }
    Ok(())
}

/// What the host asks; the process ends when it is gone, also where the plugin never answers.
fn questions(mut socket: UnixStream) -> io::Result<Receiver<Question>> {
    let (sender, asked) = channel();
    std::thread::Builder::new().spawn(move || {
        while let Ok(Some((question, _))) = frame::read(&mut socket) {
            if sender.send(question).is_err() {
                break;
            }
        }
        std::process::exit(0);
    })?;
    Ok(asked)
}

fn answered(plugin: &Plugin, question: Question) -> Answer {
    match question {
        Question::Validate { class, parameters } => {
            let found = plugin
                .create(&class)
                .and_then(|node| node.validate(&parameters));
            Answer::Validated(found.map_err(ErrorText::from))
        }
        Question::Devices => Answer::Devices(plugin.devices().map_err(|error| error.reason)),
    }
}
