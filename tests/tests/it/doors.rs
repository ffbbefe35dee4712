//! The two doors of a library: the root module for Rust and the table for all languages.
#![expect(
    unsafe_code,
    reason = "a symbol has no type, and a table is what it says"
)]

use std::path::Path;

use abi_stable::library::lib_header_from_path;
use plugin_api::c_door::abi::NodePluginTable;
use plugin_api::c_door::{ENTRY, Entry, checked};
use plugin_api::{LoadedPlugin, PluginModule_Ref};

/// The table of a library, which stays loaded.
pub(crate) fn table(path: &Path) -> &'static NodePluginTable {
    // SAFETY: a plugin of this workspace.
    let library = Box::leak(Box::new(unsafe { libloading::Library::new(path) }.unwrap()));
    // SAFETY: the contract's symbol.
    let entry = unsafe { library.get::<Entry>(ENTRY) }.unwrap();
    // SAFETY: it returns a static.
    unsafe { checked(entry()) }.unwrap()
}

/// Through the table.
pub(crate) fn c(path: &Path) -> LoadedPlugin {
    // SAFETY: a plugin of this workspace.
    unsafe { LoadedPlugin::from_table(table(path)) }
}

/// Through the root module.
pub(crate) fn rust(path: &Path) -> LoadedPlugin {
    let header = lib_header_from_path(path).unwrap();
    LoadedPlugin::from(header.init_root_module::<PluginModule_Ref>().unwrap())
}
