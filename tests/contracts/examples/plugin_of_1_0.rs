//! A plugin that was built against version 1.0 of the contract.
#![expect(missing_docs, reason = "of the static that export_root_module makes")]

contracts::plugin! {
    contract: v1_0, name: "plugin-of-1.0", minor: 0, functions_in_c: 8,
    module: {}, node: {}
}
