//! Prompts of any length, with weights, as ComfyUI encodes them.
//!
//! | written | weight |
//! | --- | --- |
//! | `(word:1.3)` | 1.3 |
//! | `(word)`, `((word))` | 1.1, 1.1² |
//! | `[word]`, `[[word]]` | 1 / 1.1, 1 / 1.1² (A1111) |
//! | `\(`, `\)`, `\[`, `\]` | the bracket itself |
//!
//! Tokens are encoded in chunks of 77 (start, 75 tokens, end), and the chunks stand one behind the other in the context.
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

use candle_core::Tensor;

use crate::error::Result;
use crate::text_encoder::TextEncoder;
use crate::tokenizer::Tokenizer;

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

/// The parts of a prompt. Brackets without a partner are text.
#[must_use]
pub fn weighted(prompt: &str) -> Vec<Weighted> {
    let characters: Vec<char> = prompt.chars().collect();
    let mut parts = Vec::new();
    collect(&characters, 1.0, &mut parts);
    parts.retain(|part| !part.text.trim().is_empty());
    parts
}

fn collect(text: &[char], weight: f64, parts: &mut Vec<Weighted>) {
    let mut plain = String::new();
    let mut i = 0;
    while i < text.len() {
        let next = text.get(i + 1).copied();
        if text[i] == '\\' && next.is_some_and(|c| "()[]".contains(c)) {
            plain.extend(next);
            i += 2;
            continue;
        }
        let end = match text[i] {
            '(' => partner(&text[i..], '(', ')'),
            '[' => partner(&text[i..], '[', ']'),
            _ => None,
        };
        let Some(end) = end.map(|length| i + length) else {
            plain.push(text[i]);
            i += 1;
            continue;
        };
        parts.push(Weighted {
            text: std::mem::take(&mut plain),
            weight,
        });
        let inside = &text[i + 1..end];
        if text[i] == '[' {
            collect(inside, weight / STEP, parts);
        } else {
            match explicit(inside) {
                Some((inside, weight)) => collect(inside, weight, parts),
                None => collect(inside, weight * STEP, parts),
            }
        }
        i = end + 1;
    }
    parts.push(Weighted {
        text: plain,
        weight,
    });
}

/// Where the bracket that opens `text` is closed.
fn partner(text: &[char], open: char, close: char) -> Option<usize> {
    let mut depth = 0usize;
    let mut is_escaped = false;
    for (i, &c) in text.iter().enumerate() {
        match c {
            '\\' if !is_escaped => {
                is_escaped = true;
                continue;
            }
            c if c == open && !is_escaped => depth += 1,
            c if c == close && !is_escaped => {
                depth -= 1;
                if depth == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
        is_escaped = false;
    }
    None
}

/// `word:1.3` as word and 1.3.
fn explicit(inside: &[char]) -> Option<(&[char], f64)> {
    let colon = inside.iter().rposition(|&c| c == ':')?;
    let number: String = inside[colon + 1..].iter().collect();
    let weight: f64 = number.trim().parse().ok()?;
    (weight.is_finite() && colon > 0).then_some((&inside[..colon], weight))
}

/// Ids and weights of one pass of the text encoder.
#[derive(Debug, Clone, PartialEq)]
struct Chunk {
    ids: Vec<u32>,
    weights: Vec<f64>,
}

/// The chunks of weighted parts; at least one. Vectors of one concept stay together where a chunk has room for them.
fn chunks(tokenizer: &Tokenizer, parts: &[Weighted]) -> Result<Vec<Chunk>> {
    let room = tokenizer.length() - 2;
    let mut chunks: Vec<Vec<(u32, f64)>> = vec![Vec::new()];
    for Weighted { text, weight } in parts {
        for group in together(tokenizer, tokenizer.pieces(text)?) {
            let fits = |n: usize| n + group.len() <= room;
            if group.len() <= room && !chunks.last().is_some_and(|chunk| fits(chunk.len())) {
                chunks.push(Vec::new());
            }
            for id in group {
                if chunks.last().is_none_or(|chunk| chunk.len() == room) {
                    chunks.push(Vec::new());
                }
                if let Some(chunk) = chunks.last_mut() {
                    chunk.push((id, *weight));
                }
            }
        }
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

/// Ids that a chunk should not part: runs of placeholders; everything else is alone.
fn together(tokenizer: &Tokenizer, ids: Vec<u32>) -> Vec<Vec<u32>> {
    let is_placeholder = |id: u32| id as usize >= tokenizer.base_vocab_size();
    let mut groups: Vec<Vec<u32>> = Vec::new();
    for id in ids {
        match groups.last_mut() {
            Some(group)
                if is_placeholder(id)
                    && group
                        .last()
                        .is_some_and(|&last| last + 1 == id && is_placeholder(last)) =>
            {
                group.push(id);
            }
            _ => groups.push(vec![id]),
        }
    }
    groups
}

/// The context of a prompt, `[1, 77·n, D]`; `learned_rows` `[K, D]` are those of the tokenizer's placeholders.
///
/// # Errors
/// Those of the tokenizer and the text encoder.
pub fn context(
    text_encoder: &TextEncoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    learned_rows: Option<&Tensor>,
) -> Result<Tensor> {
    let chunks = chunks(tokenizer, &weighted(prompt))?;
    let is_weighted = chunks
        .iter()
        .flat_map(|chunk| &chunk.weights)
        .any(|&w| w != 1.0);
    let empty = is_weighted
        .then(|| text_encoder.encode(&tokenizer.framed(&[]), None))
        .transpose()?;
    let mut encoded = Vec::with_capacity(chunks.len());
    for Chunk { ids, weights } in chunks {
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

/// Two contexts of one length: each repeated as often as the other needs, which attention does not notice.
///
/// # Errors
/// Those of the tensor library.
pub fn of_one_length(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n_a, n_b) = (a.dim(1)?, b.dim(1)?);
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a.max(1)
    };
    let length = n_a / gcd(n_a, n_b) * n_b;
    Ok((
        a.repeat((1, length / n_a, 1))?,
        b.repeat((1, length / n_b, 1))?,
    ))
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
            ("", &[]),
        ] {
            assert_eq!(parts(prompt), expected(wanted), "{prompt}");
        }
    }
}
