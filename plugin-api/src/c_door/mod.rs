//! The contract in C, for plugins and hosts in any language: `include/node_plugin.h` is generated from [`abi`] and
//! [`dlpack`].
//!
//! A library exports one function, [`ENTRY`], that returns a [`NodePluginTable`]: what the library is and a dozen
//! functions. [`export_plugin!`](crate::export_plugin) makes it for every plugin in Rust; [`LoadedPlugin`](crate::LoadedPlugin)
//! drives a library that has nothing else. Values cross as DLPack tensors, as handles of objects and as JSON; a tensor is
//! never copied on the way, but for the case that [`SharedTensor::from_dlpack`](crate::SharedTensor::from_dlpack) describes.

pub mod abi;
pub mod dlpack;
mod export;
mod extensions;
mod import;
mod objects;
mod texts;
mod values;

pub use export::table_of;
pub(crate) use import::ForeignPlugin;

use std::ffi::c_char;

use abi::{NODE_PLUGIN_MAGIC, NODE_PLUGIN_MAJOR, NodePluginTable};

/// Name of the exported function, with the NUL that C puts behind it.
pub const ENTRY: &[u8] = b"node_plugin\0";

/// What the exported function is.
pub type Entry = unsafe extern "C" fn() -> *const NodePluginTable;

impl NodePluginTable {
    /// Name of the plugin.
    #[must_use]
    pub fn name(&self) -> String {
        unpadded(&self.name)
    }

    /// Version of the plugin.
    #[must_use]
    pub fn version(&self) -> String {
        unpadded(&self.version)
    }
}

/// A table, if a host built against this crate can use it.
///
/// # Errors
/// Why it cannot, in one sentence.
///
/// # Safety
/// NULL, or what a library's [`ENTRY`] returned; the library stays loaded. The head of a table, up to its version, is laid out
/// alike in every version of the contract, and no more is read of one that cannot be used.
#[expect(unsafe_code, reason = "what a symbol gives has no type")]
pub unsafe fn checked(table: *const NodePluginTable) -> Result<&'static NodePluginTable, String> {
    let none = || Err("what its node_plugin gives is no plugin's table".to_owned());
    if table.is_null() || !table.is_aligned() {
        return none();
    }
    // SAFETY: the caller vouches for a head.
    let magic = unsafe { (&raw const (*table).magic).read() };
    if unpadded(&magic) != NODE_PLUGIN_MAGIC {
        return none();
    }
    // SAFETY: as above.
    let (struct_size, major, minor, name, version) = unsafe {
        (
            (&raw const (*table).struct_size).read() as usize,
            (&raw const (*table).major).read(),
            (&raw const (*table).minor).read(),
            (&raw const (*table).name).read(),
            (&raw const (*table).version).read(),
        )
    };
    let (name, version) = (unpadded(&name), unpadded(&version));
    if major != NODE_PLUGIN_MAJOR {
        return Err(format!(
            "the plugin {name} {version} speaks version {major}.{minor} of the contract and this host version {}; build \
             both from the same major version",
            crate::CONTRACT_VERSION
        ));
    }
    let expected = size_of::<NodePluginTable>();
    if struct_size < expected {
        return Err(format!(
            "the table of the plugin {name} {version} has {struct_size} bytes, version 1.0 has {expected}; this is a \
             fault of the plugin"
        ));
    }
    // SAFETY: it is as large as it is here, and a static that is never written.
    Ok(unsafe { &*table })
}

const fn padded<const N: usize>(text: &str) -> [c_char; N] {
    let bytes = text.as_bytes();
    let (mut out, mut i) = ([0; N], 0);
    while i < bytes.len() && i + 1 < N {
        out[i] = bytes[i] as c_char;
        i += 1;
    }
    out
}

fn unpadded(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().map(|&byte| byte as u8).collect();
    let end = bytes.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

/// As much of a text as fits, cut between characters.
fn pad_into(place: &mut [c_char], text: &str) {
    let mut end = text.len().min(place.len() - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    place.fill(0);
    for (slot, byte) in place.iter_mut().zip(text[..end].bytes()) {
        *slot = byte as c_char;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        let mut place = [1; 6];
        pad_into(&mut place, "abcdé");
        assert_eq!(unpadded(&place), "abcd");
        pad_into(&mut place, "é");
        assert_eq!(unpadded(&place), "é");
        assert_eq!(unpadded(&padded::<4>("abcdef")), "abc");
    }
}
