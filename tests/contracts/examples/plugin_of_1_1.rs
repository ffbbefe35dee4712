//! A plugin that was built against a later version of the contract.
#![expect(missing_docs, reason = "of the static that export_root_module makes")]

contracts::plugin! {
    contract: v1_1, name: "plugin-of-1.1", minor: 1, functions_in_c: 9,
    module: {n_classes: n_classes},
    node: {
        fn n_runs(&self) -> u64 {
            self.n_runs
        }
    }
}

extern "C" fn n_classes() -> u64 {
    1
}
