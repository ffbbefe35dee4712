//! Reading a library's probe symbol: the one unsafe file of this crate.
#![expect(
    unsafe_code,
    reason = "opening a library runs its initializers, and a symbol has no type"
)]

use std::path::Path;

use libloading::Library;
use plugin_api::probe::{PROBE_MAGIC, PROBE_SYMBOL, Probe};

/// Why there is no probe.
#[derive(Debug)]
pub(crate) enum NoProbe {
    /// The system cannot open the file as a library; its own words.
    NotALibrary(String),
    /// A library, but without the symbol.
    NoSymbol,
    /// The symbol is there, its content is not a probe.
    NotAProbe,
}

/// What the library at `path` says about itself. The library stays open: unloading Rust code is unsound.
///
/// # Errors
/// [`NoProbe`].
pub(crate) fn read(path: &Path) -> Result<Probe, NoProbe> {
    // SAFETY: initializers of the library run. The user named the file or put it beside the program; running its code
    // is what they asked for.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        // The system's own words are below what libloading says.
        let source = std::error::Error::source(&error).map(ToString::to_string);
        NoProbe::NotALibrary(source.unwrap_or_else(|| error.to_string()))
    })?;
    // Leaked: see above.
    let library: &'static Library = Box::leak(Box::new(library));
    // SAFETY: the symbol is only read through below, once its magic says that it is a probe.
    let symbol =
        unsafe { library.get::<*const Probe>(PROBE_SYMBOL) }.map_err(|_| NoProbe::NoSymbol)?;
    let probe: *const Probe = *symbol;
    if probe.is_null() {
        return Err(NoProbe::NotAProbe);
    }
    // SAFETY: whoever exports this name exports a static that starts with 16 bytes of magic, as the contract says; the
    // library is never unloaded.
    let magic = unsafe { std::ptr::addr_of!((*probe).magic).read_unaligned() };
    if magic != PROBE_MAGIC {
        return Err(NoProbe::NotAProbe);
    }
    // SAFETY: with the right magic, `struct_size` follows.
    let struct_size = unsafe { std::ptr::addr_of!((*probe).struct_size).read_unaligned() };
    if (struct_size as usize) < size_of::<Probe>() {
        return Err(NoProbe::NotAProbe);
    }
    // SAFETY: the static is at least as large as our `Probe`, which holds plain bytes and numbers only.
    Ok(unsafe { probe.read_unaligned() })
}
