//! A recorded file, and the table of differences from it.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use serde::de::DeserializeOwned;
use stable_diffusion::device;
use stable_diffusion::weights::TensorFile;

/// Greatest error allowed, as a fraction of the tensor's greatest magnitude.
const TOLERANCE: f64 = 5e-5;
/// The same on a GPU, whose libraries choose the order of sums.
const TOLERANCE_ON_GPU: f64 = 2e-4;

/// Where it is computed: `CONCEPTLOOM_DEVICE` names it.
pub(crate) fn device() -> &'static Device {
    device::of_environment().unwrap()
}

/// This crate's folder. Told at run time too: the program may have been built on another machine.
fn folder() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// Where the recordings are.
pub(crate) fn fixtures() -> PathBuf {
    folder().join("../../../tests/fixtures/parity")
}

/// Where the bundled checkpoint is.
pub(crate) fn sprites() -> PathBuf {
    folder().join("../sprites/model")
}

/// What the reference computed.
pub(crate) struct Recording(TensorFile);

impl Recording {
    pub(crate) fn open(name: &str) -> Self {
        let path = fixtures().join(name);
        Self(
            TensorFile::open(&path)
                .unwrap_or_else(|e| panic!("{e}\nrecord it with tests/reference/record.sh")),
        )
    }

    pub(crate) fn tensor(&self, key: &str) -> Tensor {
        self.0.read(key, device()).unwrap()
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        &self.0.metadata()[key]
    }

    pub(crate) fn json<T: DeserializeOwned>(&self, key: &str) -> T {
        serde_json::from_str(self.text(key)).unwrap()
    }

    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        self.0
            .names()
            .filter(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .collect()
    }
}

/// Differences from a recording, printed as a table when all are known.
pub(crate) struct Comparison<'a> {
    recording: &'a Recording,
    lines: Vec<String>,
    failed: usize,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(recording: &'a Recording) -> Self {
        Self {
            recording,
            lines: Vec::new(),
            failed: 0,
        }
    }

    /// Compares `found` with the recorded tensor `key`.
    pub(crate) fn check(&mut self, key: &str, found: &Tensor) {
        let tolerance = if device().is_cpu() {
            TOLERANCE
        } else {
            TOLERANCE_ON_GPU
        };
        self.check_within(key, found, tolerance);
    }

    /// The same with another greatest error.
    pub(crate) fn check_within(&mut self, key: &str, found: &Tensor, tolerance: f64) {
        let expected = self.recording.tensor(key);
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (found_values, expected_values) = (values(found), values(&expected));
        let scale = expected_values
            .iter()
            .map(|x| f64::from(x.abs()))
            .fold(0.0, f64::max);
        // A NaN must not get lost in a maximum.
        let difference = |(a, b): (&f32, &f32)| {
            if (a - b).is_nan() {
                f64::INFINITY
            } else {
                f64::from((a - b).abs())
            }
        };
        let error = found_values
            .iter()
            .zip(&expected_values)
            .map(difference)
            .fold(0.0, f64::max);
        let fits = found.elem_count() == expected.elem_count()
            && squeezed(found) == squeezed(&expected)
            && error <= tolerance * scale;
        self.failed += usize::from(!fits);
        let note = if fits { "" } else { "  <- differs" };
        let shape = format!("{:?}", expected.dims());
        let relative = error / scale;
        self.lines.push(format!(
            "{key:<66} {shape:<18} {scale:>10.3e} {error:>10.2e} {relative:>10.2e}{note}"
        ));
    }

    /// Prints the table; panics if anything differs.
    pub(crate) fn finish(self, name: &str) {
        println!(
            "\n{name} on {}, recorded with {}",
            device::describe(device()).name,
            self.recording.text("versions")
        );
        println!(
            "{:<66} {:<18} {:>10} {:>10} {:>10}",
            "tensor", "shape", "scale", "max error", "relative"
        );
        for line in &self.lines {
            println!("{line}");
        }
        assert_eq!(
            self.failed, 0,
            "tensors of {name} differ from the recorded ones, see the table"
        );
    }
}

/// The shape without its ones.
fn squeezed(tensor: &Tensor) -> Vec<usize> {
    tensor.dims().iter().copied().filter(|&d| d != 1).collect()
}
