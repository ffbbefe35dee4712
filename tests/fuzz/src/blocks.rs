//! Parts of an input whose length stands before them, and mutations that keep it true: without that nearly every mutation of them
//! would be one and the same finding, that the length is wrong.
//!
//! | kind | length |
//! | --- | --- |
//! | header of a safetensors file | `u64`, little-endian, before it |
//! | head of a frame of `--isolate` | `u32`, little-endian, 12 bytes before it |
//! | body of an HTTP request | `content-length: N` in the lines before it |

use std::ops::Range;

/// Longer ones are no part of an input.
const MOST: u64 = 1 << 20;

/// One part.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    content: Range<usize>,
    length: Length,
}

/// Where and how the length is written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Length {
    /// As a number of so many bytes, little-endian.
    Binary(Range<usize>),
    /// In digits.
    Digits(Range<usize>),
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// A block of JSON whose length of `width` bytes stands at `at`, and which begins `gap` bytes behind that.
fn binary(input: &[u8], at: usize, width: usize, gap: usize) -> Option<Block> {
    let length = at..at + width;
    let n = little_endian(input.get(length.clone())?);
    let start = length.end + gap;
    if n == 0 || n > MOST || !matches!(input.get(start)?, b'{' | b'"') {
        return None;
    }
    let content = start..start + n as usize;
    (content.end <= input.len()).then_some(Block {
        content,
        length: Length::Binary(length),
    })
}

/// A body whose length stands in digits from `at` on.
fn body(input: &[u8], at: usize) -> Option<Block> {
    const EMPTY_LINE: &[u8] = b"\r\n\r\n";
    let digits = input[at..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let length = at..at + digits;
    let n: u64 = std::str::from_utf8(&input[length.clone()])
        .ok()?
        .parse()
        .ok()?;
    let behind = input[at..]
        .windows(EMPTY_LINE.len())
        .position(|part| part == EMPTY_LINE)?;
    let start = at + behind + EMPTY_LINE.len();
    if n == 0 || n > MOST || start + n as usize > input.len() {
        return None;
    }
    Some(Block {
        content: start..start + n as usize,
        length: Length::Digits(length),
    })
}

/// All blocks of an input.
fn blocks(input: &[u8]) -> Vec<Block> {
    const LENGTH: &[u8] = b"content-length: ";
    let mut blocks = Vec::new();
    // Where a file, or a file among files, begins.
    let starts = (0..input.len()).filter(|&at| at == 0 || input[at - 1] == b'\n');
    blocks.extend(starts.filter_map(|at| binary(input, at, 8, 0)));
    blocks.extend(
        input
            .windows(LENGTH.len())
            .enumerate()
            .filter(|(_, part)| part.eq_ignore_ascii_case(LENGTH))
            .filter_map(|(at, _)| body(input, at + LENGTH.len())),
    );
    let mut at = 0;
    while let Some(frame) = binary(input, at, 4, 8) {
        let bytes = little_endian(&input[at + 4..at + 12]).min(MOST) as usize;
        at = frame.content.end + bytes;
        blocks.push(frame);
    }
    blocks
}

/// Puts `content` in the place of a block.
fn replaced(input: &[u8], block: &Block, content: &[u8]) -> Vec<u8> {
    let n = content.len();
    let (length, written) = match &block.length {
        Length::Binary(at) => (at, (n as u64).to_le_bytes()[..at.len()].to_vec()),
        Length::Digits(at) => (at, n.to_string().into_bytes()),
    };
    [
        &input[..length.start],
        &written,
        &input[length.end..block.content.start],
        content,
        &input[block.content.end..],
    ]
    .concat()
}

/// The input with one of its blocks changed, and the block's length with it; `None` if it has none.
pub fn mutated(input: &[u8], seed: u32, mutate: impl FnOnce(&[u8]) -> Vec<u8>) -> Option<Vec<u8>> {
    let blocks = blocks(input);
    let block = blocks.get(seed as usize % blocks.len().max(1))?;
    let content = mutate(&input[block.content.clone()]);
    Some(replaced(input, block, &content))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn longer(content: &[u8]) -> Vec<u8> {
        [content, b"x"].concat()
    }

    #[test]
    fn lengths_stay_true() {
        let file = b"\x02\0\0\0\0\0\0\0{}data";
        let frames = b"\x02\0\0\0\x03\0\0\0\0\0\0\0{}123\x03\0\0\0\0\0\0\0\0\0\0\0\"a\"";
        let requests = b"POST / HTTP/1.1\r\nContent-Length: 9\r\na: b\r\n\r\n{\"a\": 1}\nGET";
        let several = [b"=== a.json\n{}\n=== b +9\n", &file[..]].concat();
        for (input, seed, expected) in [
            (&file[..], 0, &b"\x03\0\0\0\0\0\0\0{}xdata"[..]),
            (
                frames,
                1,
                b"\x02\0\0\0\x03\0\0\0\0\0\0\0{}123\x04\0\0\0\0\0\0\0\0\0\0\0\"a\"x",
            ),
            (
                requests,
                0,
                b"POST / HTTP/1.1\r\nContent-Length: 10\r\na: b\r\n\r\n{\"a\": 1}\nxGET",
            ),
            (
                &several,
                2,
                b"=== a.json\n{}\n=== b +9\n\x03\0\0\0\0\0\0\0{}xdata",
            ),
        ] {
            let result = mutated(input, seed, longer).unwrap();
            assert_eq!(result, expected, "{:?}", String::from_utf8_lossy(&result));
        }
        assert_eq!(mutated(b"{}", 0, longer), None);
        let lies = b"\xff\xff\xff\xff\xff\xff\xff\xff{";
        assert_eq!(mutated(lies, 0, longer), None);
    }
}
