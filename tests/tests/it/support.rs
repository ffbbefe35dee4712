//! Building the programs, running them, reading what they left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Set to use what is built already.
const NO_BUILD: &str = "CONCEPTLOOM_TESTS_NO_BUILD";

/// `target/release` or `target/debug`: where this test was built.
fn target_dir() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().to_owned()
}

/// `cargo test` builds no binaries and libraries of other members, so the first test that needs one does. All of them at
/// once, and with examples, so that dependencies have the features that `cargo test --workspace` built them with and none is
/// compiled twice.
fn build() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        if std::env::var_os(NO_BUILD).is_some() {
            return;
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(repository()).args([
            "build",
            "--workspace",
            "--lib",
            "--bins",
            "--examples",
        ]);
        if target_dir().ends_with("release") {
            cargo.arg("--release");
        }
        let output = cargo.output().unwrap();
        assert!(
            output.status.success(),
            "cannot build the workspace:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    });
}

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// A library of this workspace.
pub(crate) fn library(name: &str) -> PathBuf {
    use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
    build();
    let (folder, name) = name.rsplit_once('/').unwrap_or(("", name));
    let path = target_dir()
        .join(folder)
        .join(format!("{DLL_PREFIX}{name}{DLL_SUFFIX}"));
    assert!(
        path.is_file(),
        "{} is not there; build the workspace first",
        path.display()
    );
    path
}

fn host_program() -> PathBuf {
    build();
    target_dir().join(format!("host-demo{}", std::env::consts::EXE_SUFFIX))
}

/// The library that misbehaves.
pub(crate) fn faulty() -> PathBuf {
    library("faulty_plugin")
}

/// A library among the examples of `plugin-api` and `contracts`.
pub(crate) fn example(name: &str) -> PathBuf {
    library(&format!("examples/{name}"))
}

/// The real one.
pub(crate) fn conceptloom() -> PathBuf {
    library("conceptloom")
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// The last line of standard error: what went wrong.
    pub(crate) fn sentence(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }

    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// An error with all of these parts, the exit code 1, and no trace of a panic.
    #[track_caller]
    pub(crate) fn failed_with(self, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(1), "{}\n{}", self.stdout, self.stderr);
        // Names of many tensors are lines of their own, below the sentence.
        let errors: Vec<_> = self.stderr.match_indices("error: ").collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        let said = &self.stderr[errors[0].0..];
        for part in parts {
            assert!(said.contains(part), "no \"{part}\" in: {}", self.stderr);
        }
        let lower = self.stderr.to_lowercase();
        assert!(!lower.contains("backtrace"), "{}", self.stderr);
        self
    }
}

/// A folder of its own in which the host runs.
pub(crate) struct Place {
    folder: TempDir,
    plugin: PathBuf,
}

impl Place {
    /// With the library that misbehaves.
    pub(crate) fn with_faulty() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            plugin: faulty(),
        }
    }

    /// With the real one.
    pub(crate) fn with_conceptloom() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            plugin: conceptloom(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(host_program());
        command
            .args(arguments)
            .current_dir(self.path())
            .env("CONCEPTLOOM_PLUGIN", &self.plugin)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn host(&self, arguments: &[&str]) -> Done {
        done(self.command(arguments).output().unwrap())
    }

    /// Writes a workflow and runs it into `out`.
    pub(crate) fn run(&self, workflow: &Value, more: &[&str]) -> Done {
        self.write("workflow.json", workflow.to_string());
        let mut arguments = vec!["run", "workflow.json", "--out", "out"];
        arguments.extend(more);
        self.host(&arguments)
    }

    /// Names of everything in the folder, hidden ones too; empty if it is not there.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path().join(folder))
            .into_iter()
            .flatten();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path().join(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }
}

pub(crate) fn done(output: std::process::Output) -> Done {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Done {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// Waits until the program has written a line with this text to standard error. Byte by byte: what follows is left for
/// others to read.
pub(crate) fn wait_for(child: &mut Child, text: &str) {
    use std::io::Read as _;
    let stderr = child.stderr.as_mut().unwrap();
    let (mut seen, mut line) = (String::new(), Vec::new());
    let mut byte = [0];
    while stderr.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte[0] == b'\n' {
            let read = String::from_utf8_lossy(&line).into_owned();
            if read.contains(text) {
                return;
            }
            seen.push_str(&read);
            line.clear();
        }
    }
    panic!("it ended before it wrote \"{text}\":\n{seen}");
}

/// Ctrl-C.
#[cfg(unix)]
pub(crate) fn interrupt(child: &Child) {
    send(child, "-INT");
}

/// A signal, as `kill` names it.
#[cfg(unix)]
pub(crate) fn send(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// A node of a workflow in the API format.
pub(crate) fn node(class: &str, inputs: Value) -> Value {
    json!({"class_type": class, "inputs": inputs})
}

/// Text chunks of a PNG file by keyword.
pub(crate) fn png_texts(png: &[u8]) -> Vec<(String, String)> {
    let mut texts = Vec::new();
    let mut rest = &png[8..];
    while rest.len() >= 12 {
        let length = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
        if &rest[4..8] == b"tEXt" {
            let text = String::from_utf8(rest[8..8 + length].to_vec()).unwrap();
            let (keyword, text) = text.split_once('\0').unwrap();
            texts.push((keyword.to_owned(), text.to_owned()));
        }
        rest = &rest[12 + length..];
    }
    texts
}

/// Pixels of a PNG file.
pub(crate) fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).unwrap().to_rgb8().into_raw()
}

/// Every file of a tree with its content.
pub(crate) fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}
