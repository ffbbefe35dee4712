//! What is done to seeds, as libFuzzer does it, but the same at every run and made smaller when something is found.

use proptest::prelude::*;

/// Bytes that formats give a meaning to.
const TOKENS: [&[u8]; 24] = [
    b"null",
    b"-1",
    b"0",
    b"1e308",
    b"18446744073709551615",
    b"9223372036854775807",
    b"4294967296",
    b"0.5",
    b"\"\"",
    b"[]",
    b"{}",
    b"true",
    b"..",
    b"/",
    b"\\",
    b"\0",
    b"%",
    b"%00",
    b"\r\n",
    b"\r\n\r\n",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xc3\x28",
    b"\"",
];

/// One change; places are parts of the length in 65536ths.
#[derive(Debug, Clone)]
pub(crate) enum Mutation {
    Flip(u16, u8),
    Set(u16, u8),
    Remove(u16, u16),
    Repeat(u16, u8),
    Token(u16, usize, bool),
    Number(u16, usize),
    /// From there on, another seed from there on.
    Splice(u16, usize, u16),
    /// The text of one number or string in the place of another.
    Swap(u16, u16),
}

/// A few mutations.
pub(crate) fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let at = any::<u16>;
    let one = prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (at(), 1..64u16).prop_map(|(at, n)| Mutation::Remove(at, n)),
        (at(), 1..32u8).prop_map(|(at, n)| Mutation::Repeat(at, n)),
        (at(), 0..TOKENS.len(), any::<bool>())
            .prop_map(|(at, token, over)| Mutation::Token(at, token, over)),
        (at(), 0..TOKENS.len()).prop_map(|(at, token)| Mutation::Number(at, token)),
        (at(), any::<usize>(), at()).prop_map(|(at, seed, from)| Mutation::Splice(at, seed, from)),
        (at(), at()).prop_map(|(a, b)| Mutation::Swap(a, b)),
    ];
    proptest::collection::vec(one, 1..6)
}

/// Where a run of letters and digits around this place begins and ends: a word of text.
fn word(bytes: &[u8], at: usize) -> (usize, usize) {
    let is_inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"-+._".contains(byte);
    let from = bytes[..at].iter().rposition(|byte| !is_inside(byte));
    let to = bytes[at..].iter().position(|byte| !is_inside(byte));
    (
        from.map_or(0, |from| from + 1),
        to.map_or(bytes.len(), |to| at + to),
    )
}

impl Mutation {
    /// Changes `bytes`.
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>, seeds: &[(String, Vec<u8>)]) {
        let place = |part: u16, len: usize| (usize::from(part) * len) >> 16;
        let n = bytes.len();
        match *self {
            Self::Splice(at, seed, from) => {
                let other = &seeds[seed % seeds.len()].1;
                bytes.truncate(place(at, n));
                bytes.extend(&other[place(from, other.len())..]);
            }
            Self::Token(at, token, false) => {
                let at = place(at, n);
                bytes.splice(at..at, TOKENS[token].iter().copied());
            }
            _ if n == 0 => {}
            Self::Flip(at, bit) => bytes[place(at, n)] ^= 1 << (bit % 8),
            Self::Set(at, byte) => bytes[place(at, n)] = byte,
            Self::Remove(at, many) => {
                let at = place(at, n);
                bytes.drain(at..n.min(at + usize::from(many)));
            }
            Self::Repeat(at, times) => {
                let at = place(at, n);
                let part = bytes[at..n.min(at + 24)].to_vec();
                bytes.splice(at..at, part.repeat(usize::from(times)));
            }
            Self::Token(at, token, true) => {
                let at = place(at, n);
                let end = n.min(at + TOKENS[token].len());
                bytes.splice(at..end, TOKENS[token].iter().copied());
            }
            Self::Number(at, token) => {
                let (from, to) = word(bytes, place(at, n));
                bytes.splice(from..to, TOKENS[token].iter().copied());
            }
            Self::Swap(a, b) => {
                let (from, to) = word(bytes, place(a, n));
                let text = bytes[from..to].to_vec();
                let (from, to) = word(bytes, place(b, n));
                bytes.splice(from..to, text);
            }
        }
    }
}
