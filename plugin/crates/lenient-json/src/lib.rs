//! JSON as Python and Windows programs write it.
//!
//! | what | who | read as |
//! | --- | --- | --- |
//! | `NaN`, `Infinity`, `-Infinity` | Python's `json.dump` | `null`: JSON has no such numbers |
//! | byte-order mark, UTF-16 | Notepad, PowerShell's `>` | the text behind it |
//!
//! Everything else is as in [`serde_json`], 64-bit whole numbers too.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Error;

/// Reads a document.
///
/// # Errors
/// Text that is no JSON, or not what `T` takes, by line and column.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(&without_non_finite(&utf8(bytes)))
}

/// Reads a document.
///
/// # Errors
/// Text that is no JSON, or not what `T` takes, by line and column.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    from_slice(text.as_bytes())
}

/// UTF-8 without a byte-order mark; what is neither it nor marked UTF-16 stays as it is.
#[must_use]
pub fn utf8(bytes: &[u8]) -> Cow<'_, [u8]> {
    let units = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes
            .chunks(2)
            .map(|pair| unit([pair[0], *pair.get(1).unwrap_or(&0)]))
            .collect();
        Cow::Owned(String::from_utf16_lossy(&units).into_bytes())
    };
    match bytes {
        [0xef, 0xbb, 0xbf, text @ ..] => Cow::Borrowed(text),
        [0xff, 0xfe, text @ ..] => units(text, u16::from_le_bytes),
        [0xfe, 0xff, text @ ..] => units(text, u16::from_be_bytes),
        text => Cow::Borrowed(text),
    }
}

const NON_FINITE: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

/// `null` in the place of numbers that JSON does not have, outside of strings.
fn without_non_finite(text: &[u8]) -> Cow<'_, [u8]> {
    let holds = |word: &[u8]| text.windows(word.len()).any(|part| part == word);
    if !NON_FINITE.into_iter().any(holds) {
        return Cow::Borrowed(text);
    }
    let mut replaced = Vec::with_capacity(text.len());
    let mut in_string = false;
    let mut rest = text;
    while let Some(&byte) = rest.first() {
        let ends = |word: &&&[u8]| !rest.get(word.len()).is_some_and(u8::is_ascii_alphanumeric);
        let word = NON_FINITE
            .iter()
            .filter(|word| rest.starts_with(word))
            .find(ends);
        if let Some(word) = word.filter(|_| !in_string) {
            replaced.extend(b"null");
            rest = &rest[word.len()..];
            continue;
        }
        // What is escaped ends no string.
        let n_bytes = if in_string && byte == b'\\' {
            rest.len().min(2)
        } else {
            1
        };
        in_string ^= byte == b'"';
        replaced.extend(&rest[..n_bytes]);
        rest = &rest[n_bytes..];
    }
    Cow::Owned(replaced)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(text: &str) -> Value {
        from_str(text).unwrap()
    }

    #[test]
    fn numbers_that_python_writes_are_null() {
        let found =
            read(r#"{"a": [NaN, -Infinity,Infinity], "b": -1, "Infinity": "NaN, \"Infinity\\"}"#);
        assert_eq!(
            found,
            json!({"a": [null, null, null], "b": -1, "Infinity": "NaN, \"Infinity\\"})
        );
        assert_eq!(read("NaN"), Value::Null);
        for wrong in ["NaNs", "-NaN", "Infinity1", "[nan]", "{NaN: 1}"] {
            assert!(from_str::<Value>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn marks_and_utf_16_are_taken_off() {
        let text = r#"{"name": "\u732b 猫"}"#;
        let expected = json!({"name": "猫 猫"});
        let marked = [b"\xef\xbb\xbf", text.as_bytes()].concat();
        let little: Vec<u8> = format!("\u{feff}{text}")
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        let big: Vec<u8> = format!("\u{feff}{text}")
            .encode_utf16()
            .flat_map(u16::to_be_bytes)
            .collect();
        for bytes in [marked, little, big] {
            assert_eq!(from_slice::<Value>(&bytes).unwrap(), expected);
        }
        assert!(
            from_slice::<Value>(&[0xff, 0xfe, 0x7b]).is_err(),
            "half a unit"
        );
    }

    #[test]
    fn whole_numbers_keep_their_64_bits() {
        assert_eq!(read("[18446744073709551615, NaN]")[0], json!(u64::MAX));
    }
}
