//! Texts and errors between Rust and C.
#![expect(
    unsafe_code,
    reason = "structs of the C contract hold pointers that its rules vouch for"
)]

use std::ffi::{CStr, c_char, c_void};

use super::abi::{NODE_PLUGIN_INTERNAL, NODE_PLUGIN_OK, NodePluginError, NodePluginSink};
use super::{pad_into, unpadded};
use crate::{ErrorCode, NodeError};

/// Text that was passed in; NULL is empty.
///
/// # Errors
/// It is not UTF-8.
///
/// # Safety
/// NULL, or ends with a NUL and is valid for `'a`.
pub(super) unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, NodeError> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: the caller vouches for it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| {
        let shown = text.to_string_lossy();
        NodeError::new(
            ErrorCode::InvalidInput,
            format!("the text {shown} is not UTF-8"),
        )
    })
}

/// Texts to pass on, each of which ends with a NUL, in one piece of memory.
pub(super) struct CTexts(Vec<u8>);

impl Default for CTexts {
    fn default() -> Self {
        // Enough for the names, the paths and the parameters of most nodes.
        Self(Vec::with_capacity(512))
    }
}

impl CTexts {
    /// Adds a text and says where it is; a NUL inside of it, which would end it, becomes a space.
    pub(super) fn push(&mut self, text: &str) -> usize {
        let place = self.0.len();
        self.0.reserve(text.len() + 1);
        self.0.extend_from_slice(text.as_bytes());
        for byte in &mut self.0[place..] {
            if *byte == 0 {
                *byte = b' ';
            }
        }
        self.0.push(0);
        place
    }

    /// A text by its place; valid for as long as this stays where it is and gets no other.
    pub(super) fn at(&self, place: usize) -> *const c_char {
        self.0[place..].as_ptr().cast()
    }
}

/// One text to pass on.
pub(super) struct CText(CTexts);

impl CText {
    /// Valid for as long as this is.
    pub(super) fn as_ptr(&self) -> *const c_char {
        self.0.at(0)
    }
}

/// Text to pass on.
pub(super) fn c_text(text: &str) -> CText {
    let mut texts = CTexts(Vec::with_capacity(text.len() + 1));
    texts.push(text);
    CText(texts)
}

/// Gives text to a sink of the other side.
///
/// # Safety
/// The sink is valid during this call.
pub(super) unsafe fn write(sink: NodePluginSink, text: &str) {
    // SAFETY: the caller vouches for it; the text is valid meanwhile.
    unsafe { (sink.write)(sink.context, text.as_ptr().cast(), text.len()) }
}

/// Collects what `fill` writes.
///
/// # Errors
/// It is not UTF-8.
pub(super) fn collected<R>(
    fill: impl FnOnce(NodePluginSink) -> R,
) -> (R, Result<String, NodeError>) {
    unsafe extern "C" fn append(context: *mut c_void, text: *const c_char, length: usize) {
        if text.is_null() || length == 0 {
            return;
        }
        // SAFETY: the context is the vector below, which lives while the sink is used, by one thread; the text is valid
        // during this call.
        let (bytes, text) = unsafe {
            (
                &mut *context.cast::<Vec<u8>>(),
                std::slice::from_raw_parts(text.cast::<u8>(), length),
            )
        };
        bytes.extend_from_slice(text);
    }
    let mut bytes: Vec<u8> = Vec::new();
    let result = fill(NodePluginSink {
        context: (&raw mut bytes).cast(),
        write: append,
    });
    let text = String::from_utf8(bytes).map_err(|_| {
        let message = "the plugin gave text that is not UTF-8; this is a fault of the plugin";
        NodeError::new(ErrorCode::Internal, message)
    });
    (result, text)
}

/// Ends a function: the number of its result, and the rest of an error where the caller wants it.
///
/// # Safety
/// NULL, or valid.
pub(super) unsafe fn ended(result: Result<(), NodeError>, error: *mut NodePluginError) -> u32 {
    let Err(found) = result else {
        return NODE_PLUGIN_OK;
    };
    // SAFETY: the caller vouches for it.
    if let Some(error) = unsafe { error.as_mut() } {
        pad_into(&mut error.message, &found.message);
        pad_into(&mut error.input, &found.input);
    }
    match found.code {
        NODE_PLUGIN_OK => NODE_PLUGIN_INTERNAL,
        code => code,
    }
}

/// An error to be filled in by the other side.
pub(super) fn no_error() -> NodePluginError {
    NodePluginError {
        input: [0; 128],
        message: [0; 1920],
    }
}

/// What the other side returned.
///
/// # Errors
/// Its error.
pub(super) fn returned(code: u32, error: &NodePluginError) -> Result<(), NodeError> {
    if code == NODE_PLUGIN_OK {
        return Ok(());
    }
    let message = match unpadded(&error.message) {
        message if message.is_empty() => format!("it failed with the code {code}"),
        message => message,
    };
    Err(NodeError {
        code,
        message: message.into(),
        input: unpadded(&error.input).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_lie_behind_each_other_and_end_where_they_end() {
        let mut texts = CTexts::default();
        let long = "a".repeat(300);
        let given = ["", "b\0c", &long, "é"];
        let places = given.map(|given| texts.push(given));
        for (place, expected) in places.into_iter().zip(["", "b c", &long, "é"]) {
            // SAFETY: it ends with a NUL and lives.
            assert_eq!(unsafe { text(texts.at(place)) }.unwrap(), expected);
        }
    }
}
