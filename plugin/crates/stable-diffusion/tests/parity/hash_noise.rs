//! Numbers that Python and Rust can both make: the Rust side of `tests/reference/hash_noise.py`.

use candle_core::Tensor;

use crate::recording::device;

/// Values in [-1, 1): a hash of the name and the element's index.
pub(crate) fn uniform(name: &str, shape: &[usize]) -> Vec<f32> {
    let fnv1a = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv1a);
    (1..=shape.iter().product::<usize>() as u64)
        .map(|i| {
            let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let z = z ^ (z >> 31);
            ((z >> 40) as f64 / 8_388_608.0 - 1.0) as f32
        })
        .collect()
}

/// Values of unit variance.
pub(crate) fn noise(name: &str, shape: &[usize]) -> Tensor {
    let values: Vec<f32> = uniform(name, shape)
        .into_iter()
        .map(|x| x * 3_f32.sqrt())
        .collect();
    Tensor::from_vec(values, shape, device()).unwrap()
}

/// A parameter of unit gain.
pub(crate) fn weight(name: &str, shape: &[usize]) -> Tensor {
    let (scale, offset) = match shape {
        [_, fan_in @ ..] if !fan_in.is_empty() => (
            (3.0 / fan_in.iter().product::<usize>() as f64).sqrt() as f32,
            0.0,
        ),
        _ if name.ends_with("bias") => (0.1, 0.0),
        _ => (0.1, 1.0),
    };
    let values: Vec<f32> = uniform(name, shape)
        .into_iter()
        .map(|x| x * scale + offset)
        .collect();
    Tensor::from_vec(values, shape, device()).unwrap()
}
