//! What a user can see, tried on the real binary and real libraries.
//!
//! | module | what |
//! | --- | --- |
//! | `contract` | a library through the contract alone, by both of its doors: memory is shared, objects are freed, panics are errors |
//! | `versions` | plugins of 1.0 of the contract in this host, this plugin in hosts of 1.0, in Rust and in C; those that know more |
//! | `languages` | the example on the contract's front page, a plugin in C, a host in Python |
//! | `check` | the validator for authors: good plugins pass, bad habits are named |
//! | `commands` | `nodes`, `validate`, usage; `nodes.json` is what the plugin says |
//! | `documents` | what documents name is there |
//! | `running` | the run's folder, its report, metadata, cache, formats |
//! | `interrupting` | Ctrl-C and going on |
//! | `killing` | kills at random moments: nothing is lost, doubled, or in the way |
//! | `faults` | every operation on the disk fails or is the last one, in turn |
//! | `isolate` | nodes in a process of their own: crashes and hangs lose one job |
//! | `bad_input` | files, graphs and folders that cannot be used: one sentence, nothing left behind |
//! | `bad_plugin` | libraries that cannot be loaded, nodes that fail, lie and panic |
//! | `plugin_search` | folders of libraries: those that crash are left out and remembered |
//! | `devices` | where it is computed: on start, in `system_stats`, in the report; devices that cannot be used |
//! | `method` | the real plugin: what comes out (`learning`), and what cannot be used (`refusing`) |
//!
//! `doors` opens libraries; `support` builds the programs and runs them; `server` asks one.
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

mod doors;
mod server;
mod support;

mod contract;
mod languages;
mod versions;

mod check;

mod commands;
mod documents;
mod running;

mod batch;
mod faults;
mod interrupting;
mod isolate;
mod killing;

mod bad_input;
mod bad_plugin;
mod plugin_search;

mod devices;

mod method;
