//! A plugin that was built against a contract that appended to tables.
#![expect(missing_docs, reason = "of the static that export_root_module makes")]

contracts::plugin! {
    contract: appended, name: "plugin-that-appends", minor: 1, functions_in_c: 9,
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
