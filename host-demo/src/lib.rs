//! A host for Conceptloom plugins: reads saved workflows, runs them, writes reports.
//!
//! In reading order: what a workflow is (`graph`, `workflow_file`), what nodes there are (`catalog` from `loader` and
//! `builtin_nodes`), whether it can run (`validate`, `schedule`), running it (`executor`, with `cache` and `events`),
//! and what is left afterwards (`run_folder`, `recorder`, `report`). `cli` ties them together for one run, `serve` for an
//! editor, `batch` for many machines, `check` for authors of plugins.
//!
//! This is the program `host-demo` as a library, for its own tests: [`main`] is all that it does, [`fuzzing`] is where strangers'
//! bytes enter it. Neither is an interface for anybody else.

pub mod fuzzing;

mod bounded_file;
mod confined;
mod graph;
mod workflow_file;

mod builtin_nodes;
mod catalog;
mod loader;
mod object_info;
mod pictures;
mod plugin_search;
mod png_text;
mod table;

mod schedule;
mod validate;

mod cache;
mod events;
mod executor;
mod file_words;
mod isolated;

mod clock;
mod console;
mod recorder;
mod report;
mod run_folder;

mod batch;
mod check;
mod child;
mod cli;
mod demo;
mod interrupt;
mod memory;
mod serve;
mod terminal;

/// The program.
pub fn main() -> std::process::ExitCode {
    memory::share_heap();
    cli::main()
}
