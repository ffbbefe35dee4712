//! The emulation of a card: built from `kernels/` and `emulate.cpp` by the system's C++ compiler, and spoken to by pipes. A
//! kernel that reads or writes outside of its buffers ends its process, which is an error of the launch.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, OnceLock},
};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use stable_diffusion::ops::kernels::{Argument, Launch, Launcher};

/// What a block may have on every card since compute capability 8.0.
const MOST_SHARED_BYTES: usize = 99 << 10;
const MOST_BLOCKS: usize = 65_535;

#[derive(Debug)]
pub(crate) struct Emulator {
    program: PathBuf,
    /// Processes that are doing nothing.
    idle: Mutex<Vec<Child>>,
    launched: Mutex<BTreeSet<String>>,
}

/// The one of this process.
pub(crate) fn emulator() -> &'static Emulator {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| Emulator {
        program: build(),
        idle: Mutex::default(),
        launched: Mutex::default(),
    })
}

/// Compiles everything, unless that has been done with these very sources.
fn build() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (own, kernels) = (here.join("tests/kernels"), here.join("kernels"));
    let is_source = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        matches!(ending, Some("cu" | "cuh" | "cpp" | "h"))
    };
    let mut sources: Vec<PathBuf> = [&own, &kernels]
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(is_source)
        .collect();
    sources.sort();
    let mut hash = blake3::Hasher::new();
    for source in &sources {
        hash.update(&std::fs::read(source).unwrap());
    }
    let hash = hash.finalize().to_hex();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    let program = folder.join(&hash[..16]);
    if program.exists() {
        return program;
    }
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let sanitizers = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let is_compiled = |path: &&PathBuf| !path.extension().is_some_and(|e| e == "h" || e == "cuh");
    let compile = |source: &PathBuf| {
        let object = folder.join(source.file_name().unwrap()).with_extension("o");
        let status = compiler()
            .args(["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror"])
            .arg("-Wno-unknown-pragmas")
            // Numbers are read as packs of them.
            .arg("-fno-strict-aliasing")
            .args(sanitizers)
            .arg(format!("-I{}", own.display()))
            .arg(format!("-I{}", kernels.display()))
            .args(["-x", "c++", "-c"])
            .arg(source)
            .arg("-o")
            .arg(&object)
            .status()
            .expect("a C++ compiler, c++ or what CXX names");
        assert!(status.success(), "{} is not compiled", source.display());
        object
    };
    let objects: Vec<PathBuf> = std::thread::scope(|scope| {
        let compiling = sources.iter().filter(is_compiled);
        let compiling: Vec<_> = compiling
            .map(|source| scope.spawn(|| compile(source)))
            .collect();
        let done = compiling.into_iter().map(|thread| thread.join().unwrap());
        done.collect()
    });
    let mut link = compiler();
    link.args(sanitizers).args(objects);
    // Another process may be doing the same.
    let new = folder.join(format!("new-{}", std::process::id()));
    assert!(link.arg("-o").arg(&new).status().unwrap().success());
    std::fs::rename(&new, &program).unwrap();
    program
}

fn compiler() -> Command {
    Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
}

impl Emulator {
    /// The kernels that were run so far.
    pub(crate) fn launched(&self) -> BTreeSet<String> {
        self.launched.lock().unwrap().clone()
    }

    fn start(&self) -> Child {
        Command::new(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        for mut child in self.idle.lock().unwrap().drain(..) {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

impl Launcher for Emulator {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch {
            kernel,
            grid,
            n_threads,
            shared_bytes,
            arguments,
            ..
        } = launch;
        assert!(
            *shared_bytes <= MOST_SHARED_BYTES,
            "{kernel}: {shared_bytes} bytes of shared memory"
        );
        assert!(
            grid.iter().all(|&n| n > 0) && grid[1].max(grid[2]) <= MOST_BLOCKS,
            "{kernel}: {grid:?} blocks"
        );
        self.launched.lock().unwrap().insert(kernel.clone());

        let mut message = Vec::new();
        let word = |message: &mut Vec<u8>, n: usize| {
            message.extend_from_slice(&u32::try_from(n).unwrap().to_le_bytes());
        };
        word(&mut message, kernel.len());
        message.extend_from_slice(kernel.as_bytes());
        for &n in grid
            .iter()
            .chain([n_threads, shared_bytes, &arguments.len()])
        {
            word(&mut message, n);
        }
        for argument in arguments {
            match argument {
                Argument::Null => word(&mut message, 0),
                Argument::Read(tensor) => {
                    let (bytes, offset) = bytes_of(tensor);
                    word(&mut message, 1);
                    word(&mut message, bytes.len());
                    word(&mut message, offset);
                    message.extend_from_slice(&bytes);
                }
                Argument::Write(tensor) => {
                    let (bytes, offset) = bytes_of(tensor);
                    word(&mut message, 2);
                    word(&mut message, bytes.len());
                    word(&mut message, offset);
                }
                Argument::Int(n) => {
                    word(&mut message, 3);
                    message.extend_from_slice(&n.to_le_bytes());
                }
                Argument::Float(x) => {
                    word(&mut message, 3);
                    message.extend_from_slice(&x.to_le_bytes());
                }
            }
        }

        let written = arguments.iter().filter_map(|argument| match argument {
            Argument::Write(tensor) => Some(*tensor),
            _ => None,
        });
        let written: Vec<&Tensor> = written.collect();
        let idle = self.idle.lock().unwrap().pop();
        let mut child = idle.unwrap_or_else(|| self.start());
        match converse(&mut child, &message, &written) {
            Ok((sentence, results)) => {
                self.idle.lock().unwrap().push(child);
                if !sentence.is_empty() {
                    bail!("{sentence}");
                }
                for (tensor, bytes) in written.iter().zip(results) {
                    tensor.inplace_op1(&Fill(bytes))?;
                }
                Ok(())
            }
            Err(_) => {
                let mut report = String::new();
                let _ = child.stderr.as_mut().unwrap().read_to_string(&mut report);
                let _ = child.wait();
                bail!("{kernel} ended the emulation: {report}")
            }
        }
    }
}

/// Sends a launch, and receives a sentence or what was written.
fn converse(
    child: &mut Child,
    message: &[u8],
    written: &[&Tensor],
) -> std::io::Result<(String, Vec<Vec<u8>>)> {
    let input = child.stdin.as_mut().unwrap();
    input.write_all(message)?;
    input.flush()?;
    let output = child.stdout.as_mut().unwrap();
    let mut length = [0; 4];
    output.read_exact(&mut length)?;
    let mut sentence = vec![0; u32::from_le_bytes(length) as usize];
    output.read_exact(&mut sentence)?;
    let mut results = Vec::new();
    if sentence.is_empty() {
        for tensor in written {
            let mut bytes = vec![0; tensor.elem_count() * tensor.dtype().size_in_bytes()];
            output.read_exact(&mut bytes)?;
            results.push(bytes);
        }
    }
    Ok((String::from_utf8(sentence).unwrap(), results))
}

/// What a contiguous tensor holds, and how far behind a multiple of 16 bytes it begins.
fn bytes_of(tensor: &Tensor) -> (Vec<u8>, usize) {
    let (storage, layout) = tensor.storage_and_layout();
    let (from, to) = layout
        .contiguous_offsets()
        .expect("kernels take contiguous tensors");
    let Storage::Cpu(storage) = &*storage else {
        panic!("the emulation takes tensors of the processor")
    };
    let bytes = match storage {
        CpuStorage::F32(values) => values[from..to]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        CpuStorage::F16(values) => values[from..to]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        CpuStorage::BF16(values) => values[from..to]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        CpuStorage::U32(values) => values[from..to]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        _ => panic!("no kernel takes {:?}", tensor.dtype()),
    };
    (bytes, from * tensor.dtype().size_in_bytes() % 16)
}

/// Writes numbers into a tensor.
struct Fill(Vec<u8>);

impl InplaceOp1 for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("kernels write contiguous tensors")
        };
        match storage {
            CpuStorage::F32(values) => fill(&mut values[from..to], &self.0, f32::from_le_bytes),
            CpuStorage::F16(values) => fill(&mut values[from..to], &self.0, f16::from_le_bytes),
            CpuStorage::BF16(values) => fill(&mut values[from..to], &self.0, bf16::from_le_bytes),
            _ => bail!("no kernel writes such a tensor"),
        }
        Ok(())
    }
}

fn fill<T, const N: usize>(values: &mut [T], bytes: &[u8], number: impl Fn([u8; N]) -> T) {
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(N)) {
        *value = number(bytes.try_into().unwrap());
    }
}
