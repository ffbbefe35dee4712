//! Both losses in plain tensor operations, written as `record_parity.py` writes them.

use candle_core::{D, Tensor};
use stable_diffusion::unet::{Observed, Stage, UNet};

/// mean(((prediction - target) union)^2)
pub(crate) fn masked(observed: &Observed, target: &Tensor, union: &Tensor) -> Tensor {
    let difference = (&observed.prediction - target)
        .unwrap()
        .broadcast_mul(union)
        .unwrap();
    difference.sqr().unwrap().mean_all().unwrap()
}

/// Sum over concepts of mean((A / max A - mask)^2), A being the mean over heads and over the layers
/// of the up and down path at their finest resolution. `masks` is [P, h, w].
pub(crate) fn attention(unet: &UNet, observed: &Observed, masks: &Tensor) -> Tensor {
    let sides = || {
        observed
            .attention
            .iter()
            .filter(|a| unet.cross_attention_layers()[a.layer].stage != Stage::Mid)
    };
    let finest = sides().map(|a| a.height * a.width).max().unwrap();
    let maps: Vec<Tensor> = sides()
        .filter(|a| a.height * a.width == finest)
        .map(|a| a.probabilities.mean(1).unwrap().squeeze(0).unwrap())
        .collect();
    let mean = Tensor::stack(&maps, 0)
        .unwrap()
        .mean(0)
        .unwrap()
        .t()
        .unwrap()
        .contiguous()
        .unwrap();
    let normalized = mean
        .broadcast_div(&mean.max_keepdim(D::Minus1).unwrap())
        .unwrap();
    let difference = (normalized - masks.flatten_from(1).unwrap()).unwrap();
    difference
        .sqr()
        .unwrap()
        .mean(1)
        .unwrap()
        .sum_all()
        .unwrap()
}
