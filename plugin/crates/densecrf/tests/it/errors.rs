//! Bad input as data: what is refused, and in which words.

use densecrf::{Appearance, CrfConfig, DenseCrf, Lattice, Smoothness, unary_from_planes};

fn picture(width: usize, height: usize, n_bytes: usize) -> String {
    DenseCrf::new(width, height, &vec![0; n_bytes], &CrfConfig::cutler())
        .unwrap_err()
        .to_string()
}

fn constants(smoothness: (f32, f32), appearance: (f32, f32, f32)) -> String {
    let smoothness = Smoothness {
        weight: smoothness.0,
        xy_std: smoothness.1,
    };
    let appearance = Appearance {
        weight: appearance.0,
        xy_std: appearance.1,
        rgb_std: appearance.2,
    };
    let error = CrfConfig::new(10, smoothness, appearance).unwrap_err();
    // The fields are public, so a picture's CRF checks them again.
    let unchecked = CrfConfig {
        iterations: 10,
        smoothness,
        appearance,
    };
    let again = DenseCrf::new(1, 1, &[0; 3], &unchecked).unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    error.to_string()
}

fn unary(n_labels: usize, unary: &[f32]) -> String {
    let crf = DenseCrf::new(3, 2, &[0; 18], &CrfConfig::cutler()).unwrap();
    crf.infer(unary, n_labels, 10).unwrap_err().to_string()
}

fn planes(n_labels: usize, planes: &[f32]) -> String {
    unary_from_planes(planes, n_labels).unwrap_err().to_string()
}

/// One value of twelve is not a number.
fn twelve(at: usize, value: f32) -> Vec<f32> {
    let mut values = vec![1.0; 12];
    values[at] = value;
    values
}

#[test]
fn each_refusal_is_one_sentence() {
    const NAN: f32 = f32::NAN;
    let narrow = CrfConfig {
        smoothness: Smoothness {
            weight: 7.0,
            xy_std: 1e-5,
        },
        ..CrfConfig::cutler()
    };
    let narrow = DenseCrf::new(3, 2, &[0; 18], &narrow)
        .unwrap_err()
        .to_string();
    let far = "lies too many standard deviations from zero for the lattice's 16-bit keys: \
               raise the standard deviations or shrink the picture";
    let cases = [
        (
            picture(0, 5, 0),
            "a picture of 0x5 pixels has nothing to label".to_owned(),
        ),
        (
            picture(5, 0, 0),
            "a picture of 5x0 pixels has nothing to label".to_owned(),
        ),
        (
            picture(3, 2, 17),
            "a picture of 3x2 pixels takes 18 RGB bytes, but 17 were given".to_owned(),
        ),
        (
            picture(3, 2, 24),
            "a picture of 3x2 pixels takes 18 RGB bytes, but 24 were given".to_owned(),
        ),
        (
            picture(40_000, 40_000, 3),
            "a picture of 40000x40000 pixels is too large for the lattice's 32-bit indices"
                .to_owned(),
        ),
        (
            picture(usize::MAX, 2, 3),
            format!(
                "a picture of {}x2 pixels is too large for the lattice's 32-bit indices",
                usize::MAX
            ),
        ),
        (narrow, format!("feature 1 {far}")),
        (
            Lattice::build(&[[0.0], [NAN]]).unwrap_err().to_string(),
            format!("feature 1 {far}"),
        ),
        (
            constants((7.0, 0.0), (10.0, 50.0, 5.0)),
            "smoothness.xy_std must be a positive number, but it is 0".to_owned(),
        ),
        (
            constants((7.0, 3.0), (10.0, -50.0, 5.0)),
            "appearance.xy_std must be a positive number, but it is -50".to_owned(),
        ),
        (
            constants((7.0, 3.0), (10.0, 50.0, NAN)),
            "appearance.rgb_std must be a positive number, but it is NaN".to_owned(),
        ),
        (
            constants((-1.0, 3.0), (10.0, 50.0, 5.0)),
            "smoothness.weight must be zero or a positive number, but it is -1".to_owned(),
        ),
        (
            constants((7.0, 3.0), (f32::INFINITY, 50.0, 5.0)),
            "appearance.weight must be zero or a positive number, but it is inf".to_owned(),
        ),
        (unary(0, &[]), "at least one label is needed".to_owned()),
        (
            unary(33, &[0.0; 198]),
            "33 labels were given, but at most 32 fit one picture".to_owned(),
        ),
        (
            unary(2, &[0.0; 11]),
            "2 labels on 6 pixels take 12 values, but 11 were given".to_owned(),
        ),
        (
            unary(2, &twelve(7, NAN)),
            "the value NaN of label 1 at pixel 1 is not a finite number".to_owned(),
        ),
        (
            unary(2, &twelve(5, f32::INFINITY)),
            "the value inf of label 0 at pixel 5 is not a finite number".to_owned(),
        ),
        (planes(0, &[]), "at least one label is needed".to_owned()),
        (
            planes(5, &[0.0; 12]),
            "12 values do not divide into 5 label planes of equal size".to_owned(),
        ),
        (
            planes(2, &twelve(11, NAN)),
            "the value NaN of label 1 at pixel 5 is not a finite number".to_owned(),
        ),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
}

#[test]
fn a_kernel_without_weight_asks_nothing_of_the_lattice() {
    let unused = Appearance {
        weight: 0.0,
        xy_std: 1e-5,
        rgb_std: 1e-5,
    };
    let config = CrfConfig {
        appearance: unused,
        ..CrfConfig::cutler()
    };
    assert!(DenseCrf::new(3, 2, &[9; 18], &config).is_ok());
}
