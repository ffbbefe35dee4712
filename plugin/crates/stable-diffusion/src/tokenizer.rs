//! CLIP's tokenizer: text to 77 ids, with placeholders for concepts as whole tokens.
//!
//! The text is brought to NFC, its white space collapsed, lower-cased, split by CLIP's pattern
//! (contractions, runs of letters, single digits, runs of anything else), and each piece is
//! byte-pair encoded with `</w>` at its end.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use crate::error::{Error, PromptError, Result};

/// CLIP's split pattern, as transformers writes it.
const PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The same without the special tokens, which are found before it is used: as OpenAI's own file has it.
const SHORT_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A prompt as the text encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedPrompt {
    /// Start, the prompt's tokens, end, then padding up to the model's length.
    pub ids: Vec<u32>,
    /// Tokens without padding.
    pub n_tokens: usize,
}

impl TokenizedPrompt {
    /// Where `id` stands, padding left out.
    pub fn positions_of(&self, id: u32) -> Vec<usize> {
        (0..self.n_tokens)
            .filter(|&position| self.ids[position] == id)
            .collect()
    }
}

/// A tokenizer with or without placeholders.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    base_vocab_size: usize,
    length: usize,
    special: Special,
}

#[derive(Debug, Clone, Copy)]
struct Special {
    start: u32,
    end: u32,
    unknown: u32,
    padding: u32,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n_placeholders = self.inner.get_vocab_size(true) - self.base_vocab_size;
        f.debug_struct("Tokenizer")
            .field("base_vocab_size", &self.base_vocab_size)
            .field("n_placeholders", &n_placeholders)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// What a `tokenizer` folder may hold.
    pub const FILES: [&str; 6] = [
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ];

    /// Builds the tokenizer from a checkpoint's `tokenizer` folder: `tokenizer.json`, or
    /// `vocab.json` and `merges.txt`; with `added_tokens.json`, `tokenizer_config.json` and
    /// `special_tokens_map.json` where they exist.
    ///
    /// * `folder`: names the folder in errors
    /// * `read`: a file of the folder, `None` if there is no such file
    /// * `length`: positions of the text encoder
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Unreadable`] naming the file at fault.
    pub fn from_files(
        folder: &str,
        read: impl Fn(&str) -> Result<Option<Vec<u8>>>,
        length: usize,
    ) -> Result<Self> {
        let names = SpecialNames::read(folder, &read)?;
        let path = |file: &str| format!("{folder}/{file}");
        let (file, json) = match (
            read("tokenizer.json")?,
            read("vocab.json")?,
            read("merges.txt")?,
        ) {
            (Some(json), _, _) => (
                "tokenizer.json",
                from_whole(&path("tokenizer.json"), &json)?,
            ),
            (None, Some(vocab), Some(merges)) => (
                "vocab.json",
                from_vocab_and_merges(&path("vocab.json"), &vocab, &merges, &names)?,
            ),
            _ => {
                let reason = "holds no CLIP vocabulary: neither tokenizer.json nor vocab.json with merges.txt";
                return Err(Error::unreadable(folder, reason));
            }
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| Error::config(path(file), format!("{e}")))?;
        if let Some(json) = read("added_tokens.json")? {
            add_tokens(&path("added_tokens.json"), &json, &mut inner)?;
        }
        Self::new(&path(file), inner, &names, length)
    }

    fn new(
        file: &str,
        mut inner: tokenizers::Tokenizer,
        names: &SpecialNames,
        length: usize,
    ) -> Result<Self> {
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::config(file, format!("{e}")))?;
        let id = |name: &str| {
            let reason = || Error::config(file, format!("the vocabulary lacks \"{name}\""));
            inner.token_to_id(name).ok_or_else(reason)
        };
        let special = Special {
            start: id(&names.start)?,
            end: id(&names.end)?,
            unknown: id(&names.unknown)?,
            padding: id(&names.padding)?,
        };
        let base_vocab_size = inner.get_vocab_size(true);
        let length = names.length.unwrap_or(length).min(length);
        Self {
            inner,
            base_vocab_size,
            length,
            special,
        }
        .with_padding(&names.padding)
    }

    /// This tokenizer padding with another token of its vocabulary, for a checkpoint that does not
    /// say so itself.
    ///
    /// # Errors
    /// [`PromptError::NoToken`] if the vocabulary lacks it.
    pub fn with_padding(mut self, token: &str) -> Result<Self> {
        let missing = || PromptError::NoToken {
            word: token.to_owned(),
        };
        self.special.padding = self.id_of(token).ok_or_else(missing)?;
        // A padding token of its own is special in a prompt, too: "!" in SD 2.x.
        let added = AddedToken::from(token.to_owned(), true);
        self.inner
            .add_special_tokens([added])
            .map_err(|e| Error::config("tokenizer", format!("{e}")))?;
        Ok(self)
    }

    /// Ids below this are the checkpoint's own.
    pub fn base_vocab_size(&self) -> usize {
        self.base_vocab_size
    }

    /// Ids of every encoded prompt: 77.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The id of exactly this token, a placeholder for example.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// This tokenizer without its placeholders, but with `tokens` instead: whole tokens, matched
    /// exactly as written, with the ids `base_vocab_size()`, `base_vocab_size() + 1`, … in order.
    ///
    /// # Errors
    /// [`PromptError::Placeholder`] for a token that is empty, listed twice, in the vocabulary,
    /// or a plain word that ordinary prompts would contain.
    pub fn with_placeholders(&self, tokens: &[String]) -> Result<Self> {
        let refuse = |token: &String, reason| {
            Err(PromptError::Placeholder {
                token: token.clone(),
                reason,
            }
            .into())
        };
        let mut with = self.clone();
        for (i, token) in tokens.iter().enumerate() {
            if token.trim().is_empty() || token.chars().any(char::is_whitespace) {
                return refuse(token, "it is empty or holds white space");
            }
            if tokens[..i].contains(token) {
                return refuse(token, "it is listed twice");
            }
            let word = format!("{}</w>", token.to_lowercase());
            if self
                .id_of(token)
                .is_some_and(|id| (id as usize) < self.base_vocab_size)
                || self.id_of(&word).is_some()
            {
                return refuse(token, "the model's vocabulary has it already");
            }
            if with.id_of(token) == Some((self.base_vocab_size + i) as u32) {
                continue;
            }
            // Not normalized: matched before the text is lower-cased. A placeholder without
            // brackets must not be found inside of a word.
            let bare = token.chars().all(char::is_alphanumeric);
            let added = AddedToken::from(token.clone(), false)
                .normalized(false)
                .single_word(bare);
            with.inner
                .add_tokens([added])
                .map_err(|e| Error::config("tokenizer", format!("{e}")))?;
            if with.id_of(token) != Some((self.base_vocab_size + i) as u32) {
                return refuse(token, "this tokenizer has other placeholders already");
            }
        }
        Ok(with)
    }

    /// The prompt's ids, padded.
    ///
    /// # Errors
    /// [`PromptError::TooLong`].
    pub fn encode(&self, prompt: &str) -> Result<TokenizedPrompt> {
        let pieces = self.pieces(prompt)?;
        let n_tokens = pieces.len() + 2;
        if n_tokens > self.length {
            return Err(PromptError::TooLong {
                tokens: n_tokens,
                limit: self.length,
            }
            .into());
        }
        let ids = self.framed(&pieces);
        Ok(TokenizedPrompt { ids, n_tokens })
    }

    /// Start, these ids, end, and padding up to the model's length.
    pub(crate) fn framed(&self, pieces: &[u32]) -> Vec<u32> {
        let mut ids = vec![self.special.start];
        ids.extend(pieces);
        ids.push(self.special.end);
        ids.resize(self.length.max(ids.len()), self.special.padding);
        ids
    }

    /// The ids of a word's pieces, without start and end.
    ///
    /// # Errors
    /// [`PromptError::NoToken`] if the word yields no token, or one that stands for "unknown".
    pub fn word_ids(&self, word: &str) -> Result<Vec<u32>> {
        let ids = self.pieces(word)?;
        if ids.is_empty() || ids.contains(&self.special.unknown) {
            return Err(PromptError::NoToken {
                word: word.to_owned(),
            }
            .into());
        }
        Ok(ids)
    }

    /// Ids of a text's pieces, without start and end.
    pub(crate) fn pieces(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::config("tokenizer", format!("{e}")))?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// What the tokenizer's configuration says beside the vocabulary.
struct SpecialNames {
    start: String,
    end: String,
    unknown: String,
    padding: String,
    length: Option<usize>,
}

impl SpecialNames {
    fn read(folder: &str, read: &impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<Self> {
        let object = |file: &str| -> Result<Map<String, Value>> {
            let Some(json) = read(file)? else {
                return Ok(Map::new());
            };
            lenient_json::from_slice(&json).map_err(|e| {
                Error::config(
                    format!("{folder}/{file}"),
                    format!("not a JSON object: {e}"),
                )
            })
        };
        let config = object("tokenizer_config.json")?;
        let map = object("special_tokens_map.json")?;
        // A token is a string, or an object with its `content`.
        let text = |value: &Value| {
            value
                .as_str()
                .or_else(|| value["content"].as_str())
                .map(str::to_owned)
        };
        let name = |key: &str, default: &str| {
            let found = config
                .get(key)
                .and_then(text)
                .or_else(|| map.get(key).and_then(text));
            found.unwrap_or_else(|| default.to_owned())
        };
        let end = name("eos_token", "<|endoftext|>");
        // Exporters write 1e30 for "no limit".
        let length = config
            .get("model_max_length")
            .and_then(Value::as_u64)
            .map(|n| n as usize);
        Ok(Self {
            start: name("bos_token", "<|startoftext|>"),
            unknown: name("unk_token", &end),
            padding: name("pad_token", &end),
            end,
            length,
        })
    }
}

/// Adds what `added_tokens.json` holds (token -> id), as whole tokens: what textual inversion learned and was saved with
/// the model. What the vocabulary has already stays.
fn add_tokens(file: &str, json: &[u8], inner: &mut tokenizers::Tokenizer) -> Result<()> {
    let fault = |reason: String| Error::config(file, reason);
    let added: BTreeMap<String, u32> =
        lenient_json::from_slice(json).map_err(|e| fault(format!("not a table of ids: {e}")))?;
    let mut by_id: Vec<(&u32, &String)> = added.iter().map(|(token, id)| (id, token)).collect();
    by_id.sort();
    for (&id, token) in by_id {
        if inner.token_to_id(token) == Some(id) {
            continue;
        }
        let whole = AddedToken::from(token.clone(), false).normalized(false);
        inner
            .add_tokens([whole])
            .map_err(|e| fault(format!("{e}")))?;
        if inner.token_to_id(token) != Some(id) {
            return Err(fault(format!(
                "\"{token}\" has the id {id}, which does not follow the vocabulary's last"
            )));
        }
    }
    Ok(())
}

/// CLIP's `tokenizer.json` for a vocabulary and merges.
fn from_vocab_and_merges(
    file: &str,
    vocab: &[u8],
    merges: &[u8],
    names: &SpecialNames,
) -> Result<Vec<u8>> {
    let fault = |reason: String| Error::config(file, reason);
    let vocab: Map<String, Value> =
        lenient_json::from_slice(vocab).map_err(|e| fault(format!("not a JSON object: {e}")))?;
    let merges = std::str::from_utf8(merges).map_err(|e| fault(format!("merges.txt: {e}")))?;
    let mut pairs = Vec::new();
    for line in merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
    {
        let pair = line
            .split_once(' ')
            .filter(|(_, right)| !right.contains(' '));
        pairs.push(pair.ok_or_else(|| fault(format!("merges.txt: \"{line}\" is no pair")))?);
    }
    let mut added: Vec<Value> = Vec::new();
    for name in [&names.start, &names.end] {
        let id = vocab
            .get(name)
            .ok_or_else(|| fault(format!("the vocabulary lacks \"{name}\"")))?;
        added.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    }
    added.sort_by_key(|token| token["id"].as_u64());
    check_merges(&vocab, pairs.iter().copied()).map_err(fault)?;
    Ok(clip(
        json!(added),
        json!(names.unknown),
        json!(vocab),
        json!(pairs),
    ))
}

/// Every pair makes a token of the vocabulary; the tokenizer takes that for granted.
fn check_merges<'a>(
    vocab: &Map<String, Value>,
    mut pairs: impl Iterator<Item = (&'a str, &'a str)>,
) -> std::result::Result<(), String> {
    let missing = pairs.find(|(left, right)| !vocab.contains_key(&[*left, right].concat()));
    missing.map_or(Ok(()), |(left, right)| {
        Err(format!(
            "the vocabulary lacks \"{left}{right}\", which the merge \"{left} {right}\" makes"
        ))
    })
}

/// What a `tokenizer.json` has in the place of CLIP's own tokenizer. The format describes programs, with patterns that a text may
/// take for ever to match and kinds of models that no text encoder here has, so the vocabulary is taken from it, and the rest has
/// to be what CLIP's is.
fn from_whole(file: &str, json: &[u8]) -> Result<Vec<u8>> {
    let fault = |reason: String| Error::config(file, reason);
    let whole: Map<String, Value> =
        lenient_json::from_slice(json).map_err(|e| fault(format!("not a JSON object: {e}")))?;
    let whole = Value::Object(whole);
    let model = &whole["model"];
    let other = |what: &str, value: &Value| {
        fault(format!(
            "its {what} is {value}: this is not the tokenizer of CLIP, which Stable Diffusion 1.x and 2.x have"
        ))
    };
    // Each with what it may be besides absent.
    for (key, supported) in [
        ("type", json!("BPE")),
        ("end_of_word_suffix", json!("</w>")),
        ("continuing_subword_prefix", json!("")),
        ("dropout", Value::Null),
        ("fuse_unk", json!(false)),
        ("byte_fallback", json!(false)),
        ("ignore_merges", json!(false)),
    ] {
        let value = &model[key];
        let may_be_absent = key != "end_of_word_suffix";
        if *value != supported && !(value.is_null() && may_be_absent) {
            return Err(other(&format!("model's \"{key}\""), value));
        }
    }
    if whole["normalizer"] != normalizer() {
        return Err(other("normalizer", &whole["normalizer"]));
    }
    let steps = &whole["pre_tokenizer"]["pretokenizers"];
    let is_split = [PATTERN, SHORT_PATTERN]
        .iter()
        .any(|pattern| steps[0] == split(pattern));
    if !is_split || steps[1]["type"] != "ByteLevel" || steps[1]["add_prefix_space"] != false {
        return Err(other("pre_tokenizer", &whole["pre_tokenizer"]));
    }
    let added = match &whole["added_tokens"] {
        Value::Null => json!([]),
        added => added.clone(),
    };
    let (unknown, vocab, merges) = (&model["unk_token"], &model["vocab"], &model["merges"]);
    let tokens = vocab
        .as_object()
        .ok_or_else(|| fault("its model has no table \"vocab\"".to_owned()))?;
    let pairs = merges
        .as_array()
        .and_then(|merges| merges.iter().map(pair).collect::<Option<Vec<_>>>())
        .ok_or_else(|| fault("its model has no list \"merges\" of pairs".to_owned()))?;
    check_merges(tokens, pairs.into_iter()).map_err(fault)?;
    Ok(clip(added, unknown.clone(), vocab.clone(), merges.clone()))
}

/// A merge of a `tokenizer.json`: two strings, or one with a space between them.
fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(merge) => merge.split_once(' '),
        Value::Array(both) => match both.as_slice() {
            [left, right] => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

fn normalizer() -> Value {
    json!({"type": "Sequence", "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]})
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": true})
}

/// CLIP's `tokenizer.json`.
fn clip(added: Value, unknown: Value, vocab: Value, merges: Value) -> Vec<u8> {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer(),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(PATTERN), byte_level]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    tokenizer.to_string().into_bytes()
}
