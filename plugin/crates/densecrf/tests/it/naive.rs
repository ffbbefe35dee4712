//! The same mathematics without shortcuts, in f64: sums over all pairs of pixels, lattice points in an ordinary map,
//! simplices found from fractional parts and barycentric coordinates from a linear system.

use std::collections::BTreeMap;

use densecrf::CrfConfig;

use crate::scene::Scene;

/// A symmetric filter as a dense matrix `[N, N]`.
pub(crate) struct Matrix {
    pub(crate) n: usize,
    pub(crate) entries: Vec<f64>,
}

/// Which filter stands behind the CRF.
#[derive(Clone, Copy)]
pub(crate) enum Filter {
    /// exp(-|f_i - f_j|²/2)
    Gaussian,
    /// The permutohedral lattice's own linear operator.
    Lattice,
}

impl Matrix {
    pub(crate) fn new(filter: Filter, features: &[Vec<f64>]) -> Self {
        match filter {
            Filter::Gaussian => gaussian(features),
            Filter::Lattice => lattice(features),
        }
    }

    pub(crate) fn apply(&self, values: &[f64]) -> Vec<f64> {
        self.entries
            .chunks(self.n)
            .map(|row| row.iter().zip(values).map(|(k, v)| k * v).sum())
            .collect()
    }

    /// diag(n) K diag(n), n = 1/√(K 1).
    pub(crate) fn normalized(mut self) -> Self {
        let norms: Vec<f64> = self
            .apply(&vec![1.0; self.n])
            .iter()
            .map(|sum| 1.0 / (sum + 1e-20).sqrt())
            .collect();
        for (i, row) in self.entries.chunks_mut(self.n).enumerate() {
            row.iter_mut()
                .zip(&norms)
                .for_each(|(k, norm)| *k *= norm * norms[i]);
        }
        self
    }
}

fn gaussian(features: &[Vec<f64>]) -> Matrix {
    let distance =
        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let row = |a: &Vec<f64>| {
        features
            .iter()
            .map(|b| (-0.5 * distance(a, b)).exp())
            .collect::<Vec<_>>()
    };
    Matrix {
        n: features.len(),
        entries: features.iter().flat_map(row).collect(),
    }
}

type Point = Vec<i64>;

/// Splat, blur and slice of each unit vector in turn.
fn lattice(features: &[Vec<f64>]) -> Matrix {
    let (n, d) = (features.len(), features[0].len());
    let simplices: Vec<Vec<(Point, f64)>> = features.iter().map(|f| simplex(&elevate(f))).collect();
    let touched: BTreeMap<Point, usize> = simplices
        .iter()
        .flatten()
        .map(|(point, _)| (point.clone(), 0))
        .collect();
    let touched: BTreeMap<Point, usize> = touched.into_keys().zip(0..).collect();
    let alpha = 1.0 / (1.0 + 0.5_f64.powi(d as i32));
    let mut entries = vec![0.0; n * n];
    for source in 0..n {
        let mut values = vec![0.0; touched.len()];
        for (point, weight) in &simplices[source] {
            values[touched[point]] += weight;
        }
        for axis in 0..=d {
            values = blur(&touched, &values, axis);
        }
        for (target, simplex) in simplices.iter().enumerate() {
            let sum: f64 = simplex
                .iter()
                .map(|(point, weight)| weight * values[touched[point]])
                .sum();
            entries[target * n + source] = alpha * sum;
        }
    }
    Matrix { n, entries }
}

fn blur(touched: &BTreeMap<Point, usize>, values: &[f64], axis: usize) -> Vec<f64> {
    let mut blurred = values.to_vec();
    for (point, &at) in touched {
        for sign in [-1, 1] {
            let d = point.len() as i64 - 1;
            let neighbor: Point = (0..point.len())
                .map(|i| point[i] + if i == axis { -sign * d } else { sign })
                .collect();
            blurred[at] += touched.get(&neighbor).map_or(0.0, |&at| 0.5 * values[at]);
        }
    }
    blurred
}

/// Onto the hyperplane Σ = 0, along the orthogonal basis (1, …, 1, -k, 0, …).
fn elevate(feature: &[f64]) -> Vec<f64> {
    let d = feature.len();
    let mut elevated = vec![0.0; d + 1];
    for k in 1..=d {
        let length = (2.0_f64 / 3.0).sqrt() * (d + 1) as f64 / ((k * (k + 1)) as f64).sqrt();
        let component = feature[k - 1] * length;
        elevated[..k].iter_mut().for_each(|e| *e += component);
        elevated[k] -= k as f64 * component;
    }
    elevated
}

/// The lattice point of each remainder r that is nearest to x: (d+1)·n + r with Σ n = -r. Rounding x/(d+1) down and
/// raising the largest fractional parts until the sum is right gives n.
fn simplex(x: &[f64]) -> Vec<(Point, f64)> {
    let period = x.len() as i64;
    let quotients: Vec<f64> = x.iter().map(|x| x / period as f64).collect();
    let mut order: Vec<usize> = (0..x.len()).collect();
    let fraction = |i: usize| quotients[i] - quotients[i].floor();
    order.sort_by(|&a, &b| fraction(b).total_cmp(&fraction(a)));
    let floor_sum: i64 = quotients.iter().map(|q| q.floor() as i64).sum();
    let vertices: Vec<Point> = (0..period)
        .map(|r| {
            let to_raise = -r - floor_sum;
            let (everywhere, raised) = (
                to_raise.div_euclid(period),
                to_raise.rem_euclid(period) as usize,
            );
            let mut n: Vec<i64> = quotients
                .iter()
                .map(|q| q.floor() as i64 + everywhere)
                .collect();
            order[..raised].iter().for_each(|&i| n[i] += 1);
            n.iter().map(|n| n * period + r).collect()
        })
        .collect();
    let weights = barycentric(&vertices, x);
    vertices.into_iter().zip(weights).collect()
}

/// Solves Σ w_r v_r = x, Σ w_r = 1 by elimination with pivoting.
fn barycentric(vertices: &[Point], x: &[f64]) -> Vec<f64> {
    let n = x.len();
    // The last coordinate follows from the others; the sum of weights takes its row.
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let coefficient = |v: &Point| if i + 1 == n { 1.0 } else { v[i] as f64 };
            let right = if i + 1 == n { 1.0 } else { x[i] };
            vertices.iter().map(coefficient).chain([right]).collect()
        })
        .collect();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))
            .unwrap();
        rows.swap(column, pivot);
        let pivot_row = rows[column].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != column) {
            let factor = row[column] / pivot_row[column];
            row.iter_mut()
                .zip(&pivot_row)
                .for_each(|(a, b)| *a -= factor * b);
        }
    }
    (0..n).map(|i| rows[i][n] / rows[i][i]).collect()
}

pub(crate) fn position_features(scene: &Scene, std: f32) -> Vec<Vec<f64>> {
    let at = |p: usize| {
        vec![
            (p % scene.width) as f64 / f64::from(std),
            (p / scene.width) as f64 / f64::from(std),
        ]
    };
    (0..scene.width * scene.height).map(at).collect()
}

pub(crate) fn color_features(scene: &Scene, xy_std: f32, rgb_std: f32) -> Vec<Vec<f64>> {
    let mut features = position_features(scene, xy_std);
    for (feature, color) in features.iter_mut().zip(scene.rgb.chunks(3)) {
        feature.extend(color.iter().map(|&c| f64::from(c) / f64::from(rgb_std)));
    }
    features
}

/// Mean field by definition. `unary` and the result are `[L, N]`.
pub(crate) fn mean_field(
    filter: Filter,
    scene: &Scene,
    unary: &[f32],
    config: &CrfConfig,
) -> Vec<f32> {
    let (smooth, look) = (config.smoothness, config.appearance);
    let kernels = [
        (
            smooth.weight,
            Matrix::new(filter, &position_features(scene, smooth.xy_std)).normalized(),
        ),
        (
            look.weight,
            Matrix::new(filter, &color_features(scene, look.xy_std, look.rgb_std)).normalized(),
        ),
    ];
    let n = scene.width * scene.height;
    let evidence: Vec<f64> = unary.iter().map(|&u| -f64::from(u)).collect();
    let mut q = softmax(&evidence, n);
    for _ in 0..config.iterations {
        let mut logits = evidence.clone();
        for (weight, kernel) in &kernels {
            for (logits, q) in logits.chunks_mut(n).zip(q.chunks(n)) {
                logits
                    .iter_mut()
                    .zip(kernel.apply(q))
                    .for_each(|(l, m)| *l += f64::from(*weight) * m);
            }
        }
        q = softmax(&logits, n);
    }
    q.iter().map(|&q| q as f32).collect()
}

fn softmax(logits: &[f64], n: usize) -> Vec<f64> {
    let mut q = vec![0.0; logits.len()];
    for pixel in 0..n {
        let column = || (pixel..logits.len()).step_by(n);
        let max = column().map(|i| logits[i]).fold(f64::MIN, f64::max);
        let sum: f64 = column().map(|i| (logits[i] - max).exp()).sum();
        column().for_each(|i| q[i] = (logits[i] - max).exp() / sum);
    }
    q
}
