//! From where long work can go on, and keeping it.
//!
//! The work offers a [`Checkpoint`] after every step; it borrows what there is and costs nothing. A [`Keeper`] writes the one
//! that is due, and finds the last whole one again.

use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use durable_files::{Generations, Pace};

use crate::error::{Error, Result};
use crate::joint_state::JointState;
use crate::learned::LearnedConcepts;
use crate::observation::Looking;
use crate::sampler::Sampling;
use crate::state::EmMoment;

/// From where work can go on with the same bits.
#[derive(Debug, Clone, Copy)]
pub enum Checkpoint<'a> {
    /// Textual inversion or stage 2 by themselves.
    Tokens(&'a LearnedConcepts),
    /// An E-step by itself.
    Looking(Looking<'a>),
    /// The alternation, which has both in it.
    Alternation(EmMoment<'a>),
    /// The joint stage.
    Joint(&'a JointState),
    /// Sampling.
    Sampling(Sampling<'a>),
}

impl Checkpoint<'_> {
    /// What its files are called; `None` of work that is kept as a part of other work only.
    #[must_use]
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Self::Tokens(_) | Self::Looking(_) => None,
            Self::Alternation(_) => Some(EM),
            Self::Joint(_) => Some(JOINT),
            Self::Sampling(_) => Some(SAMPLING),
        }
    }

    /// Whether nothing else of this kind follows: what comes then is another kind's.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Alternation(moment) if moment.is_last)
    }

    /// About how many bytes it is.
    fn bytes(&self) -> u64 {
        let numbers = match self {
            Self::Tokens(_) | Self::Looking(_) => 0,
            Self::Alternation(moment) => moment.numbers(),
            Self::Joint(state) => state.numbers(),
            Self::Sampling(sampling) => sampling.numbers(),
        };
        (numbers * size_of::<f32>()) as u64
    }

    fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Tokens(_) | Self::Looking(_) => Ok(()),
            Self::Alternation(moment) => moment.write(file),
            Self::Joint(state) => state.write(file),
            Self::Sampling(sampling) => sampling.write(file),
        }
    }

    /// Writes it to a file of its own, complete or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        durable_files::write_over(path, |file| self.write(file)).map_err(cannot_write(path))
    }
}

/// Name of the alternation's files.
pub const EM: &str = "em-state";
/// Name of the joint stage's files.
pub const JOINT: &str = "joint-state";
/// Name of sampling's files.
pub const SAMPLING: &str = "sampling-state";

fn cannot_write(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let file = path.display().to_string();
    move |error| Error::CannotWrite {
        file: file.clone(),
        reason: error.to_string(),
    }
}

/// Keeps the checkpoints of one kind in a folder, two at most, and at a pace: a kill loses 30 seconds or one step, and writing
/// takes less than 2 % of the time.
#[derive(Debug)]
pub struct Keeper {
    generations: Generations,
    pace: Pace,
    folder: std::path::PathBuf,
}

impl Keeper {
    /// Those of this name in a folder that belongs to this process. `read` makes a state of a file; the last one that can be
    /// used is returned, with a sentence for each that cannot.
    #[must_use]
    pub fn open<T>(
        folder: &Path,
        name: &str,
        read: impl Fn(&Path) -> Result<T>,
    ) -> (Self, Option<T>, Vec<String>) {
        let (mut generations, torn) = Generations::open(folder, name);
        let mut said: Vec<String> = torn
            .iter()
            .map(|torn| format!("the saved state {} {}", torn.path.display(), torn.reason))
            .collect();
        let mut state = None;
        while let Some(path) = generations.last() {
            match read(path) {
                Ok(read) => {
                    state = Some(read);
                    break;
                }
                Err(error) => said.push(format!("a saved state cannot be used: {error}")),
            }
            generations.step_back();
        }
        let then = match state {
            Some(_) => "going on from the other one",
            None => "starting anew",
        };
        for sentence in &mut said {
            *sentence = format!("{sentence}; {then}");
        }
        let keeper = Self {
            generations,
            pace: Pace::default(),
            folder: folder.to_owned(),
        };
        (keeper, state, said)
    }

    /// Asked after every step: whether this one is to be kept.
    pub fn is_due(&mut self, checkpoint: &Checkpoint<'_>) -> bool {
        self.pace.is_due(checkpoint.bytes()) || checkpoint.is_last()
    }

    /// Writes it, tensor by tensor. The one before is there until it is whole.
    ///
    /// # Errors
    /// It cannot be written; the one before is the last one then.
    pub fn keep(&mut self, checkpoint: &Checkpoint<'_>) -> Result<()> {
        let begun = Instant::now();
        let written = self.generations.write(|file| checkpoint.write(file));
        self.pace.was_written(begun.elapsed());
        written.map_err(cannot_write(&self.folder))
    }
}
