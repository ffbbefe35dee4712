//! What is paid once per picture, and what each question costs.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use densecrf::{CrfConfig, DenseCrf, unary_from_planes};

/// A shaded ground with grain and a bright disc, and planes that miss the disc by a few pixels.
fn scene(size: usize, n_labels: usize) -> (Vec<u8>, Vec<f32>) {
    let inside = |pixel: usize, shift: usize| {
        let (x, y) = ((pixel % size + shift) as f64, (pixel / size + shift) as f64);
        (x - 0.5 * size as f64).hypot(y - 0.5 * size as f64) < 0.3 * size as f64
    };
    let mut rgb = Vec::new();
    let mut planes = vec![0.0; n_labels * size * size];
    for pixel in 0..size * size {
        let grain = (pixel as u32).wrapping_mul(2_654_435_761) >> 28;
        let shade = (80 * (pixel / size) / size) as u32;
        rgb.extend(
            if inside(pixel, 0) {
                [220, 60, 40]
            } else {
                [60, 90, 120]
            }
            .map(|c: u32| (c + grain + shade).min(255) as u8),
        );
        let label = if inside(pixel, 3) {
            1
        } else {
            (pixel % size) * n_labels / size
        };
        planes[label * size * size + pixel] = 1.0;
    }
    (rgb, planes)
}

fn bench(criterion: &mut Criterion) {
    let config = CrfConfig::cutler();
    let mut group = criterion.benchmark_group("densecrf");
    group.sample_size(10);
    for size in [128, 512] {
        let (rgb, _) = scene(size, 2);
        let build = || DenseCrf::new(size, size, &rgb, &config).expect("a picture");
        group.bench_function(BenchmarkId::new("build", size), |bencher| {
            bencher.iter(build);
        });
        let crf = build();
        for n_labels in [2, 5] {
            let unary = unary_from_planes(&scene(size, n_labels).1, n_labels).expect("planes");
            let infer = || {
                crf.infer(&unary, n_labels, config.iterations)
                    .expect("energies")
            };
            let name = BenchmarkId::new(format!("infer_{n_labels}_labels"), size);
            group.bench_function(name, |bencher| bencher.iter(infer));
        }
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
