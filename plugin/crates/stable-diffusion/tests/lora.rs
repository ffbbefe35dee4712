//! Adapters and trainable weights: what is trained, what is not, and what a file keeps.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod small;

use candle_core::Tensor;
use small::{distance, random};
use stable_diffusion::{Error, lora::LoraAdapter, unet::UNet};

fn predict(unet: &UNet) -> Tensor {
    unet.forward(
        &random(&[1, 4, 8, 8], 1),
        &[500.0],
        &random(&[1, 10, 24], 2),
    )
    .unwrap()
}

fn with_adapter(unet: &UNet, adapter: &LoraAdapter) -> UNet {
    UNet::new(unet.config(), unet.weights(), Some(adapter)).unwrap()
}

/// An adapter that changes something.
fn moved_adapter(unet: &UNet) -> LoraAdapter {
    let adapter = LoraAdapter::new(unet.weights(), 3, 6.0, 5).unwrap();
    for (index, (_, variable)) in adapter.variables().iter().enumerate() {
        variable
            .set(&(random(variable.dims(), index as u64) * 0.1).unwrap())
            .unwrap();
    }
    adapter
}

#[test]
fn a_new_adapter_changes_nothing_and_trains_every_attention() {
    let unet = small::unet();
    let adapter = LoraAdapter::new(unet.weights(), 3, 6.0, 5).unwrap();
    // 14 transformer blocks of two attentions with four projections of two factors.
    assert_eq!(adapter.variables().len(), 14 * 2 * 4 * 2);
    let adapted = predict(&with_adapter(&unet, &adapter));
    assert_eq!(distance(&adapted, &predict(&unet)), 0.0);

    let gradients = adapted
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    for (name, variable) in adapter.variables() {
        let gradient = gradients
            .get(&variable)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        let is_zero = gradient
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            == 0.0;
        // While up is zero, nothing reaches down.
        assert_eq!(is_zero, name.ends_with("lora_A.weight"), "{name}");
    }
    assert!(
        unet.weights()
            .0
            .values()
            .all(|weight| gradients.get(weight).is_none())
    );
}

#[test]
fn an_adapter_is_the_change_of_weight_that_it_stands_for() {
    let unet = small::unet();
    let adapter = moved_adapter(&unet);
    let merged = adapter.merged(unet.weights()).unwrap();
    for (path, factors) in &adapter.factors {
        let change = (factors.up.matmul(&factors.down).unwrap() * (6.0 / 3.0)).unwrap();
        let name = format!("{path}.weight");
        let expected = (&unet.weights().0[&name] + change).unwrap();
        assert_eq!(distance(&merged.0[&name], &expected), 0.0, "{path}");
    }
    let merged = UNet::new(unet.config(), &merged, None).unwrap();
    let adapted = predict(&with_adapter(&unet, &adapter));
    assert!(distance(&adapted, &predict(&merged)) < 1e-5);
    assert!(distance(&adapted, &predict(&unet)) > 1e-2);
}

#[test]
fn the_start_depends_on_seed_and_path_only() {
    let unet = small::unet();
    let down = |seed| LoraAdapter::new(unet.weights(), 3, 6.0, seed).unwrap();
    let path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k";
    let (one, same, other) = (down(1), down(1), down(2));
    assert_eq!(
        distance(&one.factors[path].down, &same.factors[path].down),
        0.0
    );
    assert!(distance(&one.factors[path].down, &other.factors[path].down) > 0.0);
}

#[test]
fn a_copy_does_not_follow() {
    let unet = small::unet();
    let adapter = moved_adapter(&unet);
    let before = predict(&with_adapter(&unet, &adapter));
    let frozen = adapter.detach().unwrap();
    assert!(frozen.variables().is_empty());
    for (_, variable) in adapter.variables() {
        variable.set(&variable.zeros_like().unwrap()).unwrap();
    }
    assert_eq!(
        distance(&before, &predict(&with_adapter(&unet, &frozen))),
        0.0
    );
}

#[test]
fn adapters_of_other_models_are_refused() {
    let unet = small::unet();
    let mut adapter = moved_adapter(&unet);
    let factors = adapter.factors.values().next().unwrap().clone();
    adapter.factors.insert("conv_in".into(), factors);
    let error = UNet::new(unet.config(), unet.weights(), Some(&adapter)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Argument {
                what: "adapter",
                ..
            }
        ),
        "{error}"
    );

    let mut adapter = moved_adapter(&unet);
    let factors = adapter.factors.values_mut().next().unwrap();
    factors.down = random(&[3, 5], 0);
    let error = UNet::new(unet.config(), unet.weights(), Some(&adapter)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Argument {
                what: "adapter",
                ..
            }
        ),
        "{error}"
    );

    assert!(LoraAdapter::new(unet.weights(), 0, 1.0, 0).is_err());
}

#[test]
fn trainable_weights_are_all_trained_and_leave_the_original() {
    let unet = small::unet();
    let before = predict(&unet);
    let (weights, variables) = unet.weights().trainable(|_| true).unwrap();
    let copy = UNet::new(unet.config(), &weights, None).unwrap();
    assert_eq!(variables.len(), unet.weights().0.len());
    assert_eq!(distance(&before, &predict(&copy)), 0.0);
    let gradients = predict(&copy)
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    for (name, variable) in &variables {
        let gradient = gradients
            .get(variable)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        let is_zero = gradient
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            == 0.0;
        assert!(!is_zero, "{name}");
        variable
            .set(&(variable.as_tensor() - (gradient * 1e-3).unwrap()).unwrap())
            .unwrap();
    }
    let frozen = UNet::new(copy.config(), &copy.weights().detach(), None).unwrap();
    assert!(!predict(&frozen).track_op());
    assert_eq!(distance(&predict(&frozen), &predict(&copy)), 0.0);
    assert!(distance(&predict(&frozen), &before) > 1e-4);
    assert_eq!(distance(&predict(&unet), &before), 0.0);
}
