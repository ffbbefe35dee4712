//! Reading a library's table: what it is before anything else of it is used.
#![expect(
    unsafe_code,
    reason = "opening a library runs its initializers, and a symbol has no type"
)]

use std::path::Path;

use libloading::Library;
use plugin_api::LoadedPlugin;
use plugin_api::c_door::abi::NodePluginTable;
use plugin_api::c_door::{ENTRY, Entry, checked};

/// Why there is no table.
#[derive(Debug)]
pub(crate) enum NoTable {
    /// The system cannot open the file as a library; its own words.
    NotALibrary(String),
    /// A library, but without the symbol.
    NoSymbol,
    /// The symbol is there, and why what it gives cannot be used.
    Unusable(String),
}

/// What the library at `path` says about itself. The library stays open: unloading Rust code is unsound.
///
/// # Errors
/// [`NoTable`].
pub(crate) fn read(path: &Path) -> Result<&'static NodePluginTable, NoTable> {
    // SAFETY: initializers of the library run. The user named the file or put it beside the program; running its code
    // is what they asked for.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        // The system's own words are below what libloading says.
        let source = std::error::Error::source(&error).map(ToString::to_string);
        NoTable::NotALibrary(source.unwrap_or_else(|| error.to_string()))
    })?;
    // Leaked: see above.
    let library: &'static Library = Box::leak(Box::new(library));
    // SAFETY: whoever exports this name exports this function, as the contract says.
    let entry = unsafe { library.get::<Entry>(ENTRY) }.map_err(|_| NoTable::NoSymbol)?;
    // SAFETY: it takes nothing and returns a static.
    let table = unsafe { entry() };
    // SAFETY: it is what the entry returned, and the library is never unloaded.
    unsafe { checked(table) }.map_err(NoTable::Unusable)
}

/// The plugin behind a table, for a library that has nothing else.
pub(crate) fn plugin(table: &'static NodePluginTable) -> LoadedPlugin {
    // SAFETY: the table is that of a library which stays open; that its functions are what the header says is what its
    // author vouches for by exporting it.
    unsafe { LoadedPlugin::from_table(table) }
}
