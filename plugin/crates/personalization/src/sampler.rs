//! Prompts with learned tokens to pictures.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use stable_diffusion::DiffusionModel;
use stable_diffusion::generate::{
    Contexts, GenerateConfig, GenerateProgress, GenerateStep, Start, generate_from,
};
use stable_diffusion::prompt::{check, context};
use stable_diffusion::weights::{TensorFile, write_tensors};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::learned::LearnedConcepts;
use crate::observer::{Event, Observer, offer};
use crate::scene::Concept;

/// Prompts for [`sample`].
#[derive(Debug, Clone, Copy)]
pub struct SamplePrompts<'a> {
    /// One or more; `<token>` or `embedding:token` stands for a learned concept.
    pub prompts: &'a [&'a str],
    /// What all of them are steered away from; empty in P.
    pub negative: &'a str,
    /// Latents [B, 4, h, w], scaled, that every prompt repaints, where the configuration starts from latents.
    pub latents: Option<&'a Tensor>,
}

/// Pictures `[n, 3, H, W]` in [0, 1]: all of the first prompt, then of the second, …
///
/// # Errors
/// A token in angle brackets that nobody learned, a prompt that is longer than [`stable_diffusion::prompt`] takes, concepts of another model width, a configuration out of range, or a stop.
pub fn sample(
    model: &DiffusionModel,
    learned: Option<&LearnedConcepts>,
    prompts: &SamplePrompts<'_>,
    config: &GenerateConfig,
    observer: &mut dyn Observer,
) -> Result<Tensor> {
    let sampled = Sampled::default();
    sample_from(model, learned, prompts, config, sampled, observer)
}

/// [`sample`] from where a call with the same arguments was stopped.
///
/// # Errors
/// As [`sample`], and a state of another call.
pub fn sample_from(
    model: &DiffusionModel,
    learned: Option<&LearnedConcepts>,
    prompts: &SamplePrompts<'_>,
    config: &GenerateConfig,
    sampled: Sampled,
    observer: &mut dyn Observer,
) -> Result<Tensor> {
    if let Some(learned) = learned {
        learned.check_width(model)?;
    }
    let is_known = |token: &str| model.tokenizer.id_of(token).is_some();
    let text = |prompt: &&str| {
        check(prompt)?;
        expand(prompt, learned, is_known)
    };
    // What cannot be read is told before anything is painted.
    let texts: Vec<String> = prompts.prompts.iter().map(text).collect::<Result<_>>()?;
    let negative = text(&prompts.negative)?;
    let unconditional = encode(model, learned, &negative, observer)?;
    let n_prompts = texts.len();
    sampled.check(model, prompts, config)?;
    let Sampled {
        prompts: mut pictures,
        mut begun,
    } = sampled;
    for (index, text) in texts.iter().enumerate().skip(pictures.len()) {
        let conditional = encode(model, learned, text, observer)?;
        let contexts = Contexts {
            conditional: &conditional,
            unconditional: &unconditional,
        };
        let mut on_step = |step: GenerateStep<'_>| {
            let total = step.total * n_prompts;
            let told = observer.on_event(&Event::Denoised {
                step: index * step.total + step.step,
                total,
                clean: step.clean,
            });
            let sampling = Sampling {
                prompts: &pictures,
                begun: step.progress,
            };
            offer(observer, Checkpoint::Sampling(sampling));
            told
        };
        let progress = std::mem::take(&mut begun);
        let latents = prompts.latents;
        let own = generate_from(model, contexts, latents, config, progress, &mut on_step);
        let doing = || format!("the sampling of \"{}\"", prompts.prompts[index]);
        let own = own.map_err(|error| Error::from(error).during(doing))?;
        pictures.push(own);
    }
    Ok(Tensor::cat(&pictures, 0)?)
}

/// How far sampling has come.
#[derive(Debug, Clone, Default)]
pub struct Sampled {
    /// Pictures `[n, 3, H, W]` of the prompts that are done.
    pub prompts: Vec<Tensor>,
    /// The prompt after them.
    pub begun: GenerateProgress,
}

/// [`Sampled`], borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Sampling<'a> {
    /// Pictures `[n, 3, H, W]` of the prompts that are done.
    pub prompts: &'a [Tensor],
    /// The prompt after them.
    pub begun: &'a GenerateProgress,
}

impl Sampling<'_> {
    /// Every tensor under the name that it has in a file.
    fn tensors(&self) -> BTreeMap<String, Tensor> {
        let GenerateProgress { pictures, answers } = self.begun;
        let all = [
            (PROMPT, self.prompts),
            (PICTURE, pictures),
            (ANSWER, answers),
        ];
        all.into_iter()
            .flat_map(|(kind, tensors)| {
                let numbered = tensors.iter().enumerate();
                numbered.map(move |(i, tensor)| (format!("{kind}.{i:06}"), tensor.clone()))
            })
            .collect()
    }

    pub(crate) fn numbers(&self) -> usize {
        self.tensors().values().map(Tensor::elem_count).sum()
    }

    pub(crate) fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        let metadata = BTreeMap::from([(METADATA.to_owned(), String::new())]);
        write_tensors(file, &self.tensors(), DType::F32, &metadata)
    }
}

const PROMPT: &str = "prompt";
const PICTURE: &str = "picture";
const ANSWER: &str = "answer";
/// What says that a file is one of these, in its metadata.
const METADATA: &str = "sampling_state";

impl Sampled {
    /// Whether sampling with these arguments can go on from it.
    ///
    /// # Errors
    /// [`Error::StateOfOtherWork`].
    pub fn check(
        &self,
        model: &DiffusionModel,
        prompts: &SamplePrompts<'_>,
        config: &GenerateConfig,
    ) -> Result<()> {
        let factor = model.config.vae.downsampling();
        let (n_starts, [height, width]) = match (config.start, prompts.latents) {
            (Start::Latents { .. }, Some(latents)) => {
                let (n, _, height, width) = latents.dims4()?;
                (n, [height, width])
            }
            (Start::Noise([width, height]), _) => (1, [height / factor, width / factor]),
            // Refused where it starts.
            (Start::Latents { .. }, None) => return Ok(()),
        };
        let n_pictures = n_starts * config.n_pictures;
        let picture = |n: usize| [n, 3, height * factor, width * factor];
        let answer = [1, model.config.unet.in_channels, height, width];
        let are = |tensors: &[Tensor], shape: [usize; 4]| {
            let is = |tensor: &Tensor| tensor.dims() == shape && tensor.dtype() == DType::F32;
            tensors.iter().all(is)
        };
        let GenerateProgress { pictures, answers } = &self.begun;
        let is_one = self.prompts.len() <= prompts.prompts.len()
            && pictures.len() <= n_pictures
            && are(&self.prompts, picture(n_pictures))
            && are(pictures, picture(1))
            && are(answers, answer);
        if is_one {
            return Ok(());
        }
        let other = "other pictures, or pictures of another size";
        Err(Error::StateOfOtherWork { other })
    }

    /// Reads a state.
    ///
    /// # Errors
    /// The file is missing, truncated, or no such state.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let file = TensorFile::open(path)?;
        if !file.metadata().contains_key(METADATA) {
            return Err(Error::file(path, "is no saved state of sampling"));
        }
        let all = |kind: &str| -> Result<Vec<Tensor>> {
            let names = file
                .names()
                .filter(|name| name.split_once('.').is_some_and(|(start, _)| start == kind));
            names.map(|name| Ok(file.read(name, device)?)).collect()
        };
        Ok(Self {
            prompts: all(PROMPT)?,
            begun: GenerateProgress {
                pictures: all(PICTURE)?,
                answers: all(ANSWER)?,
            },
        })
    }
}

/// The context of a prompt in which concepts stand as all of their vectors.
fn encode(
    model: &DiffusionModel,
    learned: Option<&LearnedConcepts>,
    text: &str,
    observer: &mut dyn Observer,
) -> Result<Tensor> {
    let tokenizer = learned.map_or_else(
        || Ok(model.tokenizer.clone()),
        |learned| learned.tokenizer(model),
    )?;
    let rows = learned.map(|learned| &learned.rows);
    let mut on_chunk = |done, total| match total {
        // As quick as a step.
        1 => ControlFlow::Continue(()),
        _ => observer.on_event(&Event::Progress {
            stage: "prompt",
            done,
            total,
        }),
    };
    Ok(context(&model.text_encoder, &tokenizer, text, rows, &mut on_chunk)?.detach())
}

/// The prompt with `embedding:name` as `<name>`, and every token as all of its vectors. Tokens that the model itself knows
/// stay.
fn expand(
    prompt: &str,
    learned: Option<&LearnedConcepts>,
    is_known: impl Fn(&str) -> bool,
) -> Result<String> {
    let concepts = learned.map_or(&[][..], |learned| &learned.concepts);
    let mut text = String::new();
    let mut rest = prompt;
    while let Some(start) = next_token(rest, concepts) {
        text.push_str(&rest[..start.at]);
        if is_known(&start.token) {
            text.push_str(&start.token);
            rest = &rest[start.end..];
            continue;
        }
        let concept = concepts
            .iter()
            .position(|concept| concept.token == start.token);
        let (Some(concept), Some(learned)) = (concept, learned) else {
            let known: Vec<&str> = concepts
                .iter()
                .map(|concept| concept.token.as_str())
                .collect();
            let known = if known.is_empty() {
                "none are linked".to_owned()
            } else {
                known.join(", ")
            };
            return Err(Error::UnknownToken {
                prompt: prompt.to_owned(),
                token: start.token,
                known,
            });
        };
        text.push_str(&learned.text_of(concept));
        rest = &rest[start.end..];
    }
    text.push_str(rest);
    Ok(text)
}

struct Found {
    at: usize,
    end: usize,
    token: String,
}

/// The next `<token>` or `embedding:token` of a text. Names of files may have spaces where tokens have hyphens, and an
/// extension.
fn next_token(text: &str, concepts: &[Concept]) -> Option<Found> {
    const PREFIX: &str = "embedding:";
    const EXTENSIONS: [&str; 3] = [".safetensors", ".pt", ".bin"];
    // `a < b` is no token, and hides none behind it.
    let bracket = text.match_indices('<').find_map(|(at, _)| {
        let name = &text[at + 1..at + 1 + text[at + 1..].find('>')?];
        let is_name = !name.is_empty() && !name.contains(|c: char| c == '<' || c.is_whitespace());
        let end = at + name.len() + 2;
        let token = text[at..end].to_owned();
        is_name.then_some(Found { at, end, token })
    });
    let prefixed = text.find(PREFIX).map(|at| {
        let behind = &text[at + PREFIX.len()..];
        let in_name = |c: char| c.is_alphanumeric() || "-_.<>".contains(c);
        let spelled = |name: &str| {
            behind
                .get(..name.len())
                .is_some_and(|b| b.replace(char::is_whitespace, "-") == name)
        };
        let ends = |name: &str| !behind[name.len()..].starts_with(in_name);
        let known = concepts
            .iter()
            .map(|concept| concept.token.trim_matches(['<', '>']))
            .filter(|name| spelled(name) && ends(name))
            .max_by_key(|name| name.len());
        let length = behind.find(|c| !in_name(c)).unwrap_or(behind.len());
        let written = known.map_or_else(
            || behind[..length].trim_end_matches('.'),
            |name| &behind[..name.len()],
        );
        let plain = EXTENSIONS
            .iter()
            .find_map(|extension| written.strip_suffix(extension))
            .unwrap_or(written);
        let name = plain
            .trim_matches(['<', '>'])
            .replace(char::is_whitespace, "-");
        Found {
            at,
            end: at + PREFIX.len() + written.len(),
            token: format!("<{name}>"),
        }
    });
    match (bracket, prefixed) {
        (Some(a), Some(b)) => Some(if a.at < b.at { a } else { b }),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::Role;

    #[test]
    fn tokens_are_found_in_both_spellings() {
        let concept = |name: &str| Concept {
            token: format!("<{name}>"),
            class_word: String::new(),
            role: Role::Object,
        };
        let concepts = [concept("my"), concept("my-style-v1")];
        let token = |text| next_token(text, &concepts).map(|found| found.token);
        assert_eq!(
            token("a photo, embedding:my style v1, best").as_deref(),
            Some("<my-style-v1>")
        );
        assert_eq!(token("embedding:my style v12").as_deref(), Some("<my>"));
        assert_eq!(
            token("(embedding:rex.safetensors:1.2)").as_deref(),
            Some("<rex>")
        );
        assert_eq!(token("embedding:rex.").as_deref(), Some("<rex>"));
        assert_eq!(token("a photo of <rex> here").as_deref(), Some("<rex>"));
        assert_eq!(
            token("a photo, embedding:rex, here").as_deref(),
            Some("<rex>")
        );
        assert_eq!(token("embedding:<rex>").as_deref(), Some("<rex>"));
        assert_eq!(token("1 < 2"), None);
        assert_eq!(token("1 < 2 of <rex>").as_deref(), Some("<rex>"));
        assert_eq!(token("<> <<rex>>").as_deref(), Some("<rex>"));
        assert_eq!(token("<rex> and 1 < 2").as_deref(), Some("<rex>"));
        assert_eq!(token("plain"), None);
    }

    #[test]
    fn a_token_that_nobody_learned_is_named() {
        assert_eq!(
            expand("a <rex>", None, |token| token == "<rex>").unwrap(),
            "a <rex>"
        );
        let error = expand("a photo of <rex>", None, |_| false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("<rex>") && error.contains("none are linked"),
            "{error}"
        );
    }
}
