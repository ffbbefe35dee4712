//! One measured repetition per line of standard input, so that a driver can alternate with another implementation
//! (`benches/against_pydensecrf.py`).
//!
//! `crf_cost WIDTH HEIGHT LABELS RGB PLANES`: raw bytes, `[H, W, 3]` and `[L, H, W]` of {0, 1}. Each answer is
//! `build_ms infer_ms` on one line; at the end of the input the labels, which neither counts, are written to `PLANES.labels`.
#![expect(clippy::print_stdout, reason = "the answers of a measuring program")]

use std::error::Error;
use std::io::{Write, stdin, stdout};
use std::time::Instant;

use densecrf::{CrfConfig, DenseCrf, unary_from_planes};

/// Tensors, and what the kernels work in.
#[global_allocator]
static HEAP: machine_memory::Heap = machine_memory::Heap;

fn main() -> Result<(), Box<dyn Error>> {
    let _kept = machine_memory::keep_freed();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [width, height, n_labels, rgb, planes] = &arguments[..] else {
        return Err("usage: crf_cost WIDTH HEIGHT LABELS RGB PLANES".into());
    };
    let (width, height, n_labels): (usize, usize, usize) =
        (width.parse()?, height.parse()?, n_labels.parse()?);
    let planes_path = planes;
    let rgb = std::fs::read(rgb)?;
    let planes: Vec<f32> = std::fs::read(planes)?
        .iter()
        .map(|&byte| f32::from(byte))
        .collect();
    let unary = unary_from_planes(&planes, n_labels)?;
    let config = CrfConfig::cutler();
    let mut marginals = None;
    for line in stdin().lines() {
        line?;
        let start = Instant::now();
        let crf = DenseCrf::new(width, height, &rgb, &config)?;
        let built = Instant::now();
        marginals = Some(crf.infer(&unary, n_labels, config.iterations)?);
        let (build, infer) = (built - start, built.elapsed());
        println!(
            "{} {}",
            build.as_secs_f64() * 1e3,
            infer.as_secs_f64() * 1e3
        );
        stdout().flush()?;
    }
    let labels = marginals.map_or_else(Vec::new, |marginals| marginals.labels());
    std::fs::write(format!("{planes_path}.labels"), labels)?;
    Ok(())
}
