//! Every place where bytes of strangers are read, one target each.
//!
//! A target takes any bytes and does with them what the program would. That they are refused is fine; a panic (also one that a
//! guard catches), a hang, much memory for few bytes, and what a target says is broken are findings.
//!
//! | who | what |
//! | --- | --- |
//! | `seeds/TARGET/` | inputs that reach far, and every finding |
//! | `tests/tests/fuzz` | all seeds and a fixed number of mutations of them, with every `cargo test` |
//! | `run.sh` | the same targets under libFuzzer, guided by coverage, for as long as one likes |
//!
//! Targets that read several files take them as one input, see `files`. Names that the target does not know are passed over, so
//! no file is written anywhere else.

mod blocks;
mod checkpoints;
mod files;
mod learning;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use host_demo::fuzzing::{self, Surfaces};
use tempfile::TempDir;

pub use blocks::mutated;

/// One place where bytes are read.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Also the name of the folder of its seeds.
    pub name: &'static str,
    /// Mutated inputs that `cargo test` tries.
    pub mutations: u32,
    run: fn(&Bench, &[u8]) -> Result<(), String>,
}

/// All targets.
pub static TARGETS: [Target; 17] = [
    Target {
        name: "workflow",
        mutations: 20000,
        run: |bench, bytes| bench.surfaces()?.workflow(bytes),
    },
    Target {
        name: "names",
        mutations: 10000,
        run: |bench, bytes| bench.surfaces()?.names(&String::from_utf8_lossy(bytes)),
    },
    Target {
        name: "connection",
        mutations: 5000,
        run: |bench, bytes| bench.surfaces()?.connection(bytes),
    },
    Target {
        name: "socket",
        mutations: 5000,
        run: |bench, bytes| {
            let sent = [UPGRADE.as_bytes(), bytes].concat();
            bench.surfaces()?.connection(&sent)
        },
    },
    Target {
        name: "picture",
        mutations: 20000,
        run: |_, bytes| {
            fuzzing::picture(bytes);
            Ok(())
        },
    },
    Target {
        name: "descriptor",
        mutations: 20000,
        run: |_, bytes| {
            fuzzing::descriptor(bytes);
            Ok(())
        },
    },
    Target {
        name: "tensors",
        mutations: 20000,
        run: |bench, bytes| checkpoints::tensors(bench.folder.path(), bytes),
    },
    Target {
        name: "embedding",
        mutations: 20000,
        run: |bench, bytes| checkpoints::embedding(bench.folder.path(), bytes),
    },
    Target {
        name: "lora",
        mutations: 10000,
        run: |bench, bytes| checkpoints::lora(bench.folder.path(), &bench.work()?.model, bytes),
    },
    Target {
        name: "tokenizer",
        mutations: 10000,
        run: |_, bytes| checkpoints::tokenizer(bytes),
    },
    Target {
        name: "single_file",
        mutations: 10000,
        run: |bench, bytes| checkpoints::single_file(bench.folder.path(), bytes),
    },
    Target {
        name: "model_folder",
        mutations: 6000,
        run: |bench, bytes| checkpoints::model_folder(bench.folder.path(), bytes),
    },
    Target {
        name: "prompt",
        mutations: 2000,
        run: |bench, bytes| learning::prompt(bench.work()?, bytes),
    },
    Target {
        name: "state",
        mutations: 2000,
        run: |bench, bytes| learning::state(bench.folder.path(), bench.work()?, bytes),
    },
    Target {
        name: "data_folder",
        mutations: 3000,
        run: |bench, bytes| {
            let surfaces = bench.surfaces()?;
            files::write(surfaces.data(), bytes, &DATA)?;
            surfaces.left_behind(&files::file(bytes, "requests"))
        },
    },
    Target {
        name: "batch",
        mutations: 5000,
        run: |bench, bytes| {
            files::in_folder(bench.folder.path(), |folder| {
                files::write(folder, bytes, &["manifest.jsonl", "done.json"])?;
                bench.surfaces()?.batch(folder);
                Ok(())
            })
        },
    },
    Target {
        name: "frames",
        mutations: 20000,
        run: |_, bytes| {
            fuzzing::frames(bytes);
            Ok(())
        },
    },
];

/// Files of a server's data folder.
const DATA: [&str; 12] = [
    "queue.jsonl",
    "user/settings.json",
    "user/workflows/a.json",
    "user/comfy.templates.json",
    "models/checkpoints/a.safetensors",
    "models/embeddings/a.safetensors",
    "models/loras/a.safetensors",
    "input/a.png",
    "input/a.txt",
    "output/a.png",
    "output/a.svg",
    "work/a/em-state.a.safetensors",
];

/// Makes a connection a websocket: what follows are frames.
const UPGRADE: &str = "GET /ws?clientId=a HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";

/// What targets need: made once, by the first that does.
#[derive(Debug)]
pub struct Bench {
    library: PathBuf,
    folder: TempDir,
    surfaces: OnceCell<Result<Surfaces, String>>,
    work: OnceCell<Result<learning::SmallWork, String>>,
}

impl Bench {
    /// A bench whose host loads the plugin at `library`. Files are written in memory where the system has such a folder.
    ///
    /// # Errors
    /// No folder can be made.
    pub fn new(library: &Path) -> std::io::Result<Self> {
        Ok(Self {
            library: library.to_owned(),
            folder: tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?,
            surfaces: OnceCell::new(),
            work: OnceCell::new(),
        })
    }

    /// Runs a target on one input.
    ///
    /// # Errors
    /// What the program promises and did not keep, in words.
    pub fn run(&self, target: &Target, bytes: &[u8]) -> Result<(), String> {
        (target.run)(self, bytes)
    }

    fn work(&self) -> Result<&learning::SmallWork, String> {
        let make = || learning::SmallWork::new(checkpoints::small_model()?);
        self.work.get_or_init(make).as_ref().map_err(Clone::clone)
    }

    fn surfaces(&self) -> Result<&Surfaces, String> {
        let open =
            || Surfaces::open(&self.library, self.folder.path()).map_err(|e| format!("{e:#}"));
        self.surfaces
            .get_or_init(open)
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Where the seeds of all targets are.
#[must_use]
pub fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")
}
