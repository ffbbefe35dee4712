//! What holds for every picture and every set of planes.

use densecrf::{CrfConfig, DenseCrf, MAX_LABELS, Marginals, unary_from_planes};
use proptest::prelude::*;

use crate::scene::{Scene, max_difference};

/// Pixels by pixels of any color, with planes of any opinion.
fn scenes() -> impl Strategy<Value = Scene> {
    (1_usize..24, 1_usize..24, 1_usize..7).prop_flat_map(|(width, height, n_labels)| {
        let rgb = proptest::collection::vec(any::<u8>(), width * height * 3);
        let planes = proptest::collection::vec(-2.0_f32..2.0, width * height * n_labels);
        (rgb, planes).prop_map(move |(rgb, planes)| Scene {
            width,
            height,
            rgb,
            planes,
            n_labels,
        })
    })
}

fn infer(scene: &Scene, unary: &[f32], n_labels: usize) -> Marginals {
    let config = CrfConfig::cutler();
    let crf = DenseCrf::new(scene.width, scene.height, &scene.rgb, &config).unwrap();
    crf.infer(unary, n_labels, config.iterations).unwrap()
}

fn bits(q: &[f32]) -> Vec<u32> {
    q.iter().map(|q| q.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn marginals_are_probabilities(scene in scenes()) {
        let unary = unary_from_planes(&scene.planes, scene.n_labels).unwrap();
        let q = infer(&scene, &unary, scene.n_labels).q;
        let n_pixels = scene.width * scene.height;
        for pixel in 0..n_pixels {
            let column: Vec<f32> = q[pixel..].iter().step_by(n_pixels).copied().collect();
            prop_assert!(column.iter().all(|q| (0.0..=1.000_001).contains(q)), "{column:?}");
            prop_assert!((column.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{column:?}");
        }
    }

    #[test]
    fn labels_have_no_order(scene in scenes(), turn in 0_usize..6) {
        let n_pixels = scene.width * scene.height;
        let turn = (turn % scene.n_labels) * n_pixels;
        let unary = unary_from_planes(&scene.planes, scene.n_labels).unwrap();
        let mut turned = unary.clone();
        turned.rotate_left(turn);
        let mut q = infer(&scene, &unary, scene.n_labels).q;
        q.rotate_left(turn);
        // Only the order of the softmax's sum differs, but mean field can amplify it.
        let error = max_difference(&q, &infer(&scene, &turned, scene.n_labels).q);
        prop_assert!(error < 1e-3, "{error}");
    }

    #[test]
    fn no_opinion_stays_no_opinion(scene in scenes(), energy in 0.0_f32..10.0) {
        let unary = vec![energy; scene.planes.len()];
        let q = infer(&scene, &unary, scene.n_labels).q;
        prop_assert!(q.iter().all(|q| (q - 1.0 / scene.n_labels as f32).abs() < 1e-5), "{q:?}");
    }

    #[test]
    fn an_impossible_label_changes_nothing(scene in scenes()) {
        // Crosses the widths to which labels are padded.
        let unary = unary_from_planes(&scene.planes, scene.n_labels).unwrap();
        let n_pixels = scene.width * scene.height;
        let mut padded = unary.clone();
        padded.resize(unary.len() + 3 * n_pixels, 1000.0);
        let q = infer(&scene, &unary, scene.n_labels).q;
        let with = infer(&scene, &padded, scene.n_labels + 3).q;
        prop_assert!(with[q.len()..].iter().all(|&q| q == 0.0));
        let error = max_difference(&q, &with[..q.len()]);
        prop_assert!(error < 1e-3, "{error}");
    }

    #[test]
    fn unary_energies_are_clipped_log_probabilities(scene in scenes()) {
        let unary = unary_from_planes(&scene.planes, scene.n_labels).unwrap();
        let n_pixels = scene.width * scene.height;
        for pixel in 0..n_pixels {
            let column = |values: &[f32]| -> Vec<f64> {
                values[pixel..].iter().step_by(n_pixels).map(|&x| f64::from(x)).collect()
            };
            let sum: f64 = column(&scene.planes).iter().map(|x| x.exp()).sum();
            for (plane, energy) in column(&scene.planes).iter().zip(column(&unary)) {
                let exact = -(plane.exp() / sum).clamp(1e-5, 1.0).ln();
                prop_assert!((energy - exact).abs() < 1e-5, "{energy} {exact}");
            }
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    // Large enough for every stage to be shared out.
    let scene = Scene::new(211, 157, 5);
    let unary = unary_from_planes(&scene.planes, scene.n_labels).unwrap();
    let on_threads = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        pool.install(|| infer(&scene, &unary, scene.n_labels))
    };
    let one = on_threads(1);
    assert!(one.labels().contains(&4), "the scene is not trivial");
    for n_threads in [2, 3, 8] {
        assert_eq!(
            bits(&one.q),
            bits(&on_threads(n_threads).q),
            "{n_threads} threads"
        );
    }
}

#[test]
fn one_picture_answers_many_questions_the_same_way() {
    let scene = Scene::new(40, 30, 3);
    let unary = unary_from_planes(&scene.planes, 3).unwrap();
    let crf = DenseCrf::new(40, 30, &scene.rgb, &CrfConfig::cutler()).unwrap();
    let first = crf.infer(&unary, 3, 10).unwrap();
    crf.infer(&unary[..2400], 2, 3).unwrap();
    assert_eq!(crf.infer(&unary, 3, 10).unwrap(), first);
}

#[test]
fn the_picture_overrules_noisy_planes() {
    let scene = Scene::new(96, 64, 3);
    let unary = unary_from_planes(&scene.planes, 3).unwrap();
    let labels = infer(&scene, &unary, 3).labels();
    // Inside the first disc every pixel, misled or not, now says 1.
    for (y, x) in (22..42).flat_map(|y| (14..34).map(move |x| (y, x))) {
        assert_eq!(labels[y * 96 + x], 1, "pixel {x}, {y}");
    }
}

#[test]
fn zero_iterations_and_zero_weights_return_the_planes() {
    let scene = Scene::new(12, 9, 4);
    let unary = unary_from_planes(&scene.planes, 4).unwrap();
    let mut config = CrfConfig::cutler();
    let prior: Vec<f32> = unary.iter().map(|u| (-u).exp()).collect();
    let crf = DenseCrf::new(12, 9, &scene.rgb, &config).unwrap();
    assert!(max_difference(&crf.infer(&unary, 4, 0).unwrap().q, &prior) < 1e-6);
    (config.smoothness.weight, config.appearance.weight) = (0.0, 0.0);
    let crf = DenseCrf::new(12, 9, &scene.rgb, &config).unwrap();
    assert!(max_difference(&crf.infer(&unary, 4, 10).unwrap().q, &prior) < 1e-6);
}

#[test]
fn every_label_count_up_to_the_limit_fits() {
    let rgb = vec![90; 6 * 5 * 3];
    let crf = DenseCrf::new(6, 5, &rgb, &CrfConfig::cutler()).unwrap();
    for n_labels in 1..=MAX_LABELS {
        let mut unary = vec![3.0; n_labels * 30];
        unary[(n_labels - 1) * 30..].fill(1.0);
        let marginals = crf.infer(&unary, n_labels, 10).unwrap();
        assert_eq!(marginals.labels(), vec![n_labels as u8 - 1; 30]);
    }
}
