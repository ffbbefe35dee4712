//! Prompts longer than one pass of the text encoder, with weights, as ComfyUI encodes them.
//!
//! | written | weight |
//! | --- | --- |
//! | `(word:1.3)` | 1.3 |
//! | `(word)`, `((word))` | 1.1, 1.1² |
//! | `[word]`, `[[word]]` | 1 / 1.1, 1 / 1.1² (A1111) |
//! | `\(`, `\)`, `\[`, `\]` | the bracket itself |
//!
//! Tokens are encoded in chunks of 77 (start, 75 tokens, end), and the chunks stand one behind the other in the context. A
//! weighted part of less than 8 tokens that does not fit into a chunk any more begins the next one.
//! A weight moves a token's embedding away from that of the empty prompt:
//!
//! ```text
//! z'_i = e_i + w_i (z_i - e_i)
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | z | `[1, 77·n, D]` | the chunks' embeddings |
//! | e | `[1, 77, D]` | that of the empty prompt, once per chunk |
//! | w | `[77·n]` | weights; 1 for start, end and padding |

use std::ops::ControlFlow;

use candle_core::Tensor;

use crate::error::{Error, PromptError, Result};
use crate::text_encoder::TextEncoder;
use crate::tokenizer::Tokenizer;

/// Most characters of a prompt. A prompt beyond it is a file that was pasted by mistake.
pub const MAX_CHARACTERS: usize = 20_000;
/// Most tokens of a prompt, the vectors of its concepts among them: 64 chunks. Every one of them is looked at by every pixel
/// in every step.
pub const MAX_TOKENS: usize = 64 * 75;

/// Largest weight, of either sign: far beyond what makes a picture better, and far from where numbers end.
pub const MAX_WEIGHT: f64 = 100.0;

/// What one pair of brackets multiplies by, or divides.
const STEP: f64 = 1.1;

/// A part of a prompt and how much it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// The text, without brackets that carry weights.
    pub text: String,
    /// 1 leaves it as it is.
    pub weight: f64,
}

/// The parts of a prompt. Brackets without a partner are text. Takes time in proportion to the prompt's length, however
/// deep its brackets are.
#[must_use]
pub fn weighted(prompt: &str) -> Vec<Weighted> {
    let text: Vec<char> = prompt.chars().collect();
    let partners = partners(&text);
    let (mut parts, mut plain) = (Vec::new(), String::new());
    // Of the brackets around: where their text ends, where they close, and the weight outside of them.
    let mut around: Vec<(usize, usize, f64)> = Vec::new();
    let (mut weight, mut i) = (1.0, 0);
    while i < text.len() {
        if is_escape(&text, i) {
            plain.push(text[i + 1]);
            i += 2;
            continue;
        }
        let is_end = around.last().is_some_and(|&(text_end, ..)| text_end == i);
        let opens = partners[i].filter(|&end| end > i);
        if opens.is_none() && !is_end {
            plain.push(text[i]);
            i += 1;
            continue;
        }
        parts.push(Weighted {
            text: std::mem::take(&mut plain),
            weight,
        });
        match opens {
            Some(end) => {
                let written = (text[i] == '(')
                    .then(|| weight_before(&text, i, end))
                    .flatten();
                let (text_end, inside) = match written {
                    Some(written) => written,
                    None if text[i] == '(' => (end, weight * STEP),
                    None => (end, weight / STEP),
                };
                around.push((text_end, end, weight));
                weight = inside;
                i += 1;
            }
            None => {
                if let Some((_, end, outside)) = around.pop() {
                    weight = outside;
                    i = end + 1;
                }
            }
        }
    }
    parts.push(Weighted {
        text: plain,
        weight,
    });
    parts.retain(|part| !part.text.trim().is_empty());
    parts
}

/// Whether a backslash stands before a bracket here.
fn is_escape(text: &[char], i: usize) -> bool {
    text[i] == '\\' && text.get(i + 1).is_some_and(|c| "()[]".contains(*c))
}

/// For every bracket the place of its partner.
fn partners(text: &[char]) -> Vec<Option<usize>> {
    let mut partners = vec![None; text.len()];
    let mut open: Vec<usize> = Vec::new();
    let mut n_open = [0usize; 2];
    let mut i = 0;
    while i < text.len() {
        if is_escape(text, i) {
            i += 2;
            continue;
        }
        match text[i] {
            '(' | '[' => {
                n_open[usize::from(text[i] == '[')] += 1;
                open.push(i);
            }
            ')' | ']' if n_open[usize::from(text[i] == ']')] > 0 => {
                let wanted = if text[i] == ']' { '[' } else { '(' };
                // What opened in between has no partner.
                while let Some(start) = open.pop() {
                    n_open[usize::from(text[start] == '[')] -= 1;
                    if text[start] == wanted {
                        (partners[start], partners[i]) = (Some(i), Some(start));
                        break;
                    }
                }
            }
            _ => {}
        }
        i += 1;
    }
    partners
}

/// Where `:1.3` begins before the end of the bracket that opens at `start`, and the number.
fn weight_before(text: &[char], start: usize, end: usize) -> Option<(usize, f64)> {
    let in_number = |c: &char| c.is_ascii_digit() || "+-.eE ".contains(*c);
    let length = text[start + 1..end]
        .iter()
        .rev()
        .take_while(|c| in_number(c))
        .count();
    let colon = (end - length).checked_sub(1)?;
    let number: String = text[colon + 1..end].iter().collect();
    let weight: f64 = number.trim().parse().ok()?;
    (text[colon] == ':' && colon > start + 1 && weight.is_finite()).then_some((colon, weight))
}

/// Ids and weights of one pass of the text encoder.
#[derive(Debug, Clone, PartialEq)]
struct Chunk {
    ids: Vec<u32>,
    weights: Vec<f64>,
}

/// Tokens from which on a group is parted where a chunk is full; a shorter one moves to the next chunk as a whole.
const LARGE: usize = 8;

/// The chunks of weighted parts; at least one. The vectors of one concept stay together where a chunk has room for them.
fn chunks(tokenizer: &Tokenizer, parts: &[Weighted]) -> Result<Vec<Chunk>> {
    let room = tokenizer.length() - 2;
    let mut chunks: Vec<Vec<(u32, f64)>> = Vec::new();
    let mut chunk: Vec<(u32, f64)> = Vec::new();
    for Weighted { text, weight } in parts {
        for group in groups(tokenizer, tokenizer.pieces(text)?) {
            let stays_together = group.ids.len() <= if group.is_concept { room } else { LARGE - 1 };
            if stays_together && chunk.len() + group.ids.len() > room {
                chunks.push(std::mem::take(&mut chunk));
            }
            for id in group.ids {
                if chunk.len() == room {
                    chunks.push(std::mem::take(&mut chunk));
                }
                chunk.push((id, *weight));
            }
        }
    }
    chunks.push(chunk);
    let n_tokens = chunks.iter().map(Vec::len).sum();
    if n_tokens > MAX_TOKENS {
        let begins = parts.first().map_or("", |part| &part.text);
        return Err(too_much(begins, n_tokens, "tokens", MAX_TOKENS));
    }
    let padded = |tokens: Vec<(u32, f64)>| {
        let (ids, mut weights): (Vec<u32>, Vec<f64>) = tokens.into_iter().unzip();
        let ids = tokenizer.framed(&ids);
        weights.insert(0, 1.0);
        weights.resize(ids.len(), 1.0);
        Chunk { ids, weights }
    };
    Ok(chunks.into_iter().map(padded).collect())
}

/// Ids that belong together.
struct Group {
    ids: Vec<u32>,
    /// Whether they are the vectors of one concept.
    is_concept: bool,
}

/// The concepts' vectors, and the text between them.
fn groups(tokenizer: &Tokenizer, ids: Vec<u32>) -> Vec<Group> {
    let is_placeholder = |id: u32| id as usize >= tokenizer.base_vocab_size();
    let mut groups: Vec<Group> = Vec::new();
    for id in ids {
        let is_concept = is_placeholder(id);
        let goes_on = |group: &Group| {
            let follows = group.ids.last().is_some_and(|&last| last + 1 == id);
            group.is_concept == is_concept && (!is_concept || follows)
        };
        match groups.last_mut() {
            Some(group) if goes_on(group) => group.ids.push(id),
            _ => groups.push(Group {
                ids: vec![id],
                is_concept,
            }),
        }
    }
    groups
}

fn too_much(begins: &str, length: usize, unit: &'static str, limit: usize) -> Error {
    Error::Prompt(PromptError::TooMuch {
        begins: beginning(begins),
        length,
        unit,
        limit,
    })
}

/// What a text is told by.
fn beginning(text: &str) -> String {
    text.trim().chars().take(30).collect()
}

/// Whether a prompt, as it is written, is one.
///
/// # Errors
/// It has more than [`MAX_CHARACTERS`], or a part that weighs more than [`MAX_WEIGHT`].
pub fn check(prompt: &str) -> Result<()> {
    match prompt.chars().count() {
        ..=MAX_CHARACTERS => check_weights(&weighted(prompt)),
        n => Err(too_much(prompt, n, "characters", MAX_CHARACTERS)),
    }
}

fn check_weights(parts: &[Weighted]) -> Result<()> {
    match parts.iter().find(|part| part.weight.abs() > MAX_WEIGHT) {
        None => Ok(()),
        Some(part) => Err(Error::Prompt(PromptError::TooHeavy {
            begins: beginning(&part.text),
        })),
    }
}

/// The context of a prompt, `[1, 77·n, D]`; `learned_rows` `[K, D]` are those of the tokenizer's placeholders.
///
/// * `on_chunk`: called before each pass of the text encoder, with those that are done and those in all; `Break` stops
///
/// # Errors
/// A prompt of more than [`MAX_TOKENS`], a weight beyond [`MAX_WEIGHT`], [`Error::Canceled`] if `on_chunk` broke off, and those of the tokenizer and the text
/// encoder.
pub fn context(
    text_encoder: &TextEncoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    learned_rows: Option<&Tensor>,
    on_chunk: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Tensor> {
    let parts = weighted(prompt);
    check_weights(&parts)?;
    let chunks = chunks(tokenizer, &parts)?;
    let is_weighted = chunks
        .iter()
        .flat_map(|chunk| &chunk.weights)
        .any(|&w| w != 1.0);
    let empty = is_weighted
        .then(|| text_encoder.encode(&tokenizer.framed(&[]), None))
        .transpose()?;
    let mut encoded = Vec::with_capacity(chunks.len());
    let n_chunks = chunks.len();
    for Chunk { ids, weights } in chunks {
        if on_chunk(encoded.len(), n_chunks).is_break() {
            return Err(Error::Canceled);
        }
        let plain = text_encoder.encode(&ids, learned_rows)?;
        encoded.push(match &empty {
            Some(empty) => {
                let weights: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
                let weights = Tensor::from_vec(weights, (1, ids.len(), 1), plain.device())?;
                (empty + (plain - empty)?.broadcast_mul(&weights)?)?
            }
            None => plain,
        });
    }
    Ok(Tensor::cat(&encoded, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(prompt: &str) -> Vec<(String, f64)> {
        let rounded = |w: f64| (w * 1e6).round() / 1e6;
        let parts = weighted(prompt).into_iter();
        parts
            .map(|part| (part.text, rounded(part.weight)))
            .collect()
    }

    fn expected(parts: &[(&str, f64)]) -> Vec<(String, f64)> {
        parts
            .iter()
            .map(|(text, w)| ((*text).to_owned(), *w))
            .collect()
    }

    #[test]
    fn brackets_weigh() {
        for (prompt, wanted) in [
            ("a dog", &[("a dog", 1.0)][..]),
            (
                "a (red:1.3) dog",
                &[("a ", 1.0), ("red", 1.3), (" dog", 1.0)],
            ),
            ("(a) ((b))", &[("a", 1.1), ("b", 1.21)]),
            ("[a] [[b]]", &[("a", 0.909091), ("b", 0.826446)]),
            ("(a (b:2) c:0.5)", &[("a ", 0.5), ("b", 2.0), (" c", 0.5)]),
            ("(a (b))", &[("a ", 1.1), ("b", 1.21)]),
            (r"a \(b\) \[c\]", &[("a (b) [c]", 1.0)]),
            (r"(a \) b:2)", &[("a ) b", 2.0)]),
            ("a ( b", &[("a ( b", 1.0)]),
            ("a ) b :)", &[("a ) b :)", 1.0)]),
            ("(12:30 at night)", &[("12:30 at night", 1.1)]),
            ("(<rex> <rex>_1:1.2)", &[("<rex> <rex>_1", 1.2)]),
            ("(a:nan) (:2) ()", &[("a:nan", 1.1), (":2", 1.1)]),
            ("(a:-0.5)", &[("a", -0.5)]),
            ("(a [b) c]", &[("a [b", 1.1), (" c]", 1.0)]),
            ("[a (b] c)", &[("a (b", 0.909091), (" c)", 1.0)]),
            ("((a:2):3)", &[("a", 2.0)]),
            ("", &[]),
        ] {
            assert_eq!(parts(prompt), expected(wanted), "{prompt}");
        }
    }

    #[test]
    fn prompts_have_a_length() {
        check(&"é".repeat(MAX_CHARACTERS)).unwrap();
        let error = check(&"lorem ".repeat(200_000)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the prompt \"lorem lorem lorem lorem lorem …\" has 1200000 characters, at most 20000 are taken: shorten it"
        );
    }

    #[test]
    fn weights_have_a_limit() {
        for fine in ["(a:100) (b:-100)", "a ((((b))))", "(a:1e400)"] {
            check(fine).unwrap();
        }
        let deep = format!("{}a dog{}", "(".repeat(2000), ")".repeat(2000));
        for heavy in [
            "b (a dog:101)",
            "(a dog:-1e300)",
            &deep,
            "((a dog:0.1):1e9) (a dog:1e9)",
        ] {
            let error = check(heavy).unwrap_err().to_string();
            assert!(
                error.starts_with("\"a dog…\" weighs more than 100 in the prompt"),
                "{error}"
            );
        }
    }

    #[test]
    fn deep_and_open_brackets_take_no_longer_than_text() {
        let n = 200_000;
        let deep = format!("{}a{}", "(".repeat(n), ")".repeat(n));
        assert_eq!(weighted(&deep).len(), 1);
        assert_eq!(weighted(&"(".repeat(n)).len(), 1);
        assert_eq!(
            weighted(&format!("{}{}", "[".repeat(n), ")".repeat(n))).len(),
            1
        );
        assert_eq!(weighted(&"(a:1".repeat(n)).len(), 1);
    }
}
