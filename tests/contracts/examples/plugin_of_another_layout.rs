//! A plugin that claims version 1.0 and whose types are laid out in another way.
#![expect(missing_docs, reason = "of the static that export_root_module makes")]

contracts::plugin! {
    contract: another_layout, name: "plugin-of-another-layout", minor: 0, functions_in_c: 8,
    module: {}, node: {}
}
