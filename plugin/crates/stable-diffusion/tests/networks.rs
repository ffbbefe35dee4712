//! The text encoder and the U-Net as a whole: what a caller may rely on, for any weights. Agreement with
//! diffusers is tested on recorded tensors elsewhere.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod small;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use small::{distance, random};
use stable_diffusion::{
    Error,
    config::VaeConfig,
    lora::LoraAdapter,
    memory::Memory,
    ops::{Backend, Precision},
    text_encoder::TextEncoder,
    unet::{Stage, UNet, Watch},
    vae::Vae,
    weights::{WeightMap, encode_tensors},
};

/// Both have to keep what they promise, wherever the tensors are.
fn for_every_backend(test: fn()) {
    Backend::Host.within(test);
    Backend::Device.within(test);
}

fn text_encoder() -> TextEncoder {
    let config = small::config().text_encoder;
    WeightMap::random(4, |w| TextEncoder::new(&config, w).map(drop))
        .unwrap()
        .build("text encoder", |w| TextEncoder::new(&config, w))
        .unwrap()
}

#[test]
fn a_learned_row_equal_to_a_word_gives_the_bits_of_the_word() {
    let encoder = text_encoder();
    let rows = encoder.token_table().narrow(0, 7, 2).unwrap();
    let word = encoder.encode(&[1, 8, 2, 7], None).unwrap();
    let learned = encoder.encode(&[1, 21, 2, 20], Some(&rows)).unwrap();
    assert_eq!(word.dims(), [1, 4, 24]);
    assert_eq!(distance(&word, &learned), 0.0);
}

#[test]
fn gradients_reach_the_rows_that_occur_and_only_positions_after_them() {
    for_every_backend(gradients_reach_the_rows_that_occur_and_only_positions_after_them_here);
}

fn gradients_reach_the_rows_that_occur_and_only_positions_after_them_here() {
    let encoder = text_encoder();
    let rows = Var::from_tensor(&random(&[3, 24], 0)).unwrap();
    let context = encoder.encode(&[1, 2, 20, 22, 3], Some(&rows)).unwrap();
    let gradient_at = |position: usize| -> Vec<f32> {
        let loss = context
            .narrow(1, position, 1)
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap();
        let gradient = loss.backward().unwrap().get(&rows).unwrap().clone();
        gradient.abs().unwrap().sum(1).unwrap().to_vec1().unwrap()
    };
    assert_eq!(gradient_at(1), [0.0; 3]);
    let after_first = gradient_at(2);
    assert!(after_first[0] > 0.0 && after_first[1..] == [0.0; 2]);
    let at_end = gradient_at(4);
    assert!(at_end[0] > 0.0 && at_end[1] == 0.0 && at_end[2] > 0.0);
}

#[test]
fn the_text_encoder_refuses_what_it_has_no_row_for() {
    let encoder = text_encoder();
    let rows = random(&[1, 24], 0);
    for (ids, rows) in [
        (&[][..], None),
        (&[1; 11], None),
        (&[20], None),
        (&[21], Some(&rows)),
    ] {
        let error = encoder.encode(ids, rows).unwrap_err();
        assert!(
            matches!(error, Error::Argument { what: "ids", .. }),
            "{error}"
        );
    }
}

#[test]
fn layers_are_listed_in_the_order_in_which_they_run() {
    let unet = small::unet();
    let listed: Vec<(&str, Stage, usize, usize)> = unet
        .cross_attention_layers()
        .iter()
        .map(|layer| {
            (
                layer.name.as_str(),
                layer.stage,
                layer.resolution,
                layer.heads,
            )
        })
        .collect();
    assert_eq!(listed.len(), 1 + 4 + 1 + 6 + 2);
    let first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2";
    assert_eq!(listed[0], (first, Stage::Down, 16, 2));
    let deep = "down_blocks.1.attentions.1.transformer_blocks.1.attn2";
    assert_eq!(listed[4], (deep, Stage::Down, 8, 4));
    assert_eq!(
        listed[5],
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2",
            Stage::Mid,
            4,
            2
        )
    );
    let last = "up_blocks.2.attentions.1.transformer_blocks.0.attn2";
    assert_eq!(listed[13], (last, Stage::Up, 16, 2));

    let observed = observe(&unet, Watch::All(&[0]));
    let indices: Vec<usize> = observed.iter().map(|(layer, _)| *layer).collect();
    assert_eq!(indices, (0..14).collect::<Vec<_>>());
    for (layer, probabilities) in observed {
        let expected = &unet.cross_attention_layers()[layer];
        assert_eq!(
            probabilities.dims(),
            [2, expected.heads, expected.resolution.pow(2), 1]
        );
    }
}

fn observe(unet: &UNet, watch: Watch<'_>) -> Vec<(usize, Tensor)> {
    let (latents, context) = (random(&[2, 4, 16, 16], 1), random(&[1, 10, 24], 2));
    let observed = unet
        .forward_observed(&latents, &[3.0, 700.0], &context, watch)
        .unwrap();
    observed
        .attention
        .into_iter()
        .map(|layer| (layer.layer, layer.probabilities))
        .collect()
}

#[test]
fn watching_changes_nothing_and_probabilities_sum_to_one() {
    for_every_backend(watching_changes_nothing_and_probabilities_sum_to_one_here);
}

fn watching_changes_nothing_and_probabilities_sum_to_one_here() {
    let unet = small::unet();
    let (latents, context) = (random(&[2, 4, 16, 16], 1), random(&[1, 10, 24], 2));
    let plain = unet.forward(&latents, &[3.0, 700.0], &context).unwrap();
    let positions: Vec<usize> = (0..10).collect();
    let watch = Watch::Layers(&[2, 5], &positions);
    let observed = unet
        .forward_observed(&latents, &[3.0, 700.0], &context, watch)
        .unwrap();
    assert_eq!(distance(&plain, &observed.prediction), 0.0);
    let layers: Vec<usize> = observed.attention.iter().map(|layer| layer.layer).collect();
    assert_eq!(layers, [2, 5]);
    for layer in &observed.attention {
        let sums = layer.probabilities.sum(3).unwrap();
        assert!(distance(&sums, &sums.ones_like().unwrap()) < 1e-6);
        assert_eq!(layer.height * layer.width, layer.probabilities.dims()[2]);
    }
    // A subset of positions is a subset of the columns.
    let some = observe(&unet, Watch::Layers(&[5], &[7, 1]));
    for (column, position) in [(0, 7), (1, 1)] {
        let all = observed.attention[1]
            .probabilities
            .narrow(3, position, 1)
            .unwrap();
        assert_eq!(
            distance(&some[0].1.narrow(3, column, 1).unwrap(), &all),
            0.0
        );
    }
}

#[test]
fn features_are_the_planes_of_the_way_up() {
    let unet = small::unet();
    let (latents, context) = (random(&[2, 4, 16, 16], 1), random(&[1, 10, 24], 2));
    let features = |n_up| unet.features(&latents, &[3.0, 700.0], &context, n_up);
    for (n_up, [channels, side]) in [(1, [32, 8]), (2, [32, 16]), (3, [16, 16])] {
        assert_eq!(features(n_up).unwrap().dims(), [2, channels, side, side]);
    }
    for n_up in [0, 4] {
        let error = features(n_up).unwrap_err();
        assert!(
            matches!(error, Error::Argument { what: "n_up", .. }),
            "{error}"
        );
    }
}

#[test]
fn samples_of_a_batch_do_not_see_each_other() {
    for_every_backend(samples_of_a_batch_do_not_see_each_other_here);
}

fn samples_of_a_batch_do_not_see_each_other_here() {
    let unet = small::unet();
    // Odd sides are rounded on the way down and restored on the way up.
    let (latents, context) = (random(&[2, 4, 14, 11], 1), random(&[2, 10, 24], 2));
    let together = unet.forward(&latents, &[3.0, 700.0], &context).unwrap();
    assert_eq!(together.dims(), latents.dims());
    for (sample, timestep) in [3.0, 700.0].into_iter().enumerate() {
        let one = |tensor: &Tensor| tensor.narrow(0, sample, 1).unwrap();
        let alone = unet
            .forward(&one(&latents), &[timestep], &one(&context))
            .unwrap();
        assert!(distance(&one(&together), &alone) < 1e-5);
    }
}

#[test]
fn contexts_of_one_latent_give_what_each_gives_alone() {
    for_every_backend(contexts_of_one_latent_give_what_each_gives_alone_here);
}

fn contexts_of_one_latent_give_what_each_gives_alone_here() {
    let unet = small::unet();
    let latents = random(&[1, 4, 14, 11], 1);
    let contexts = [random(&[1, 10, 24], 2), random(&[1, 10, 24], 3)];
    let both = Tensor::cat(&contexts, 0).unwrap();
    let watch = Watch::WithSelfAttention(&[0, 3], &[2, 4]);
    let stem = unet.stem(&latents, &[700.0], watch).unwrap();
    let together = unet.forward_from(&stem, &both, watch).unwrap();
    assert_eq!(together.prediction.dims(), [2, 4, 14, 11]);
    let each = unet.forward_each(&latents, &[700.0], &contexts).unwrap();
    for (sample, context) in contexts.iter().enumerate() {
        // Nothing is shared where the same latents come as two samples.
        let twice = Tensor::cat(&[&latents, &latents], 0).unwrap();
        let alone = unet
            .forward_observed(&twice, &[700.0, 700.0], context, watch)
            .unwrap();
        let one = |tensor: &Tensor, sample| tensor.narrow(0, sample, 1).unwrap();
        let is_same = |shared: &Tensor, alone: &Tensor| {
            assert!(distance(&one(shared, sample), &one(alone, 0)) < 1e-5);
        };
        is_same(&together.prediction, &alone.prediction);
        assert!(distance(&each[sample], &one(&alone.prediction, 0)) < 1e-5);
        assert_eq!(together.attention.len(), 2);
        for (shared, alone) in together.attention.iter().zip(&alone.attention) {
            is_same(&shared.probabilities, &alone.probabilities);
            let [shared, alone] = [shared, alone].map(|layer| layer.self_attention.clone());
            is_same(&shared.unwrap(), &alone.unwrap());
        }
    }
}

#[test]
fn a_stem_tells_no_self_attention_that_was_not_asked_for() {
    let unet = small::unet();
    let (latents, context) = (random(&[1, 4, 16, 16], 1), random(&[1, 10, 24], 2));
    let all = Watch::WithSelfAttention(&[0], &[4]);
    let stem = unet.stem(&latents, &[3.0], all).unwrap();
    let observed = unet.forward_from(&stem, &context, Watch::Layers(&[0], &[4]));
    assert!(observed.unwrap().attention[0].self_attention.is_none());
    let stem = unet.stem(&latents, &[3.0], Watch::NOTHING).unwrap();
    let error = unet.forward_from(&stem, &context, all).unwrap_err();
    assert!(
        matches!(error, Error::Argument { what: "watch", .. }),
        "{error}"
    );
}

#[test]
fn gradients_reach_the_context_and_no_frozen_weight() {
    for_every_backend(gradients_reach_the_context_and_no_frozen_weight_here);
}

fn gradients_reach_the_context_and_no_frozen_weight_here() {
    let unet = small::unet();
    let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
    let latents = random(&[2, 4, 16, 16], 1);
    let watch = Watch::Layers(&[13], &[4]);
    let observed = unet
        .forward_observed(&latents, &[3.0, 700.0], &context, watch)
        .unwrap();
    for loss in [
        observed.prediction.sqr(),
        observed.attention[0].probabilities.sqr(),
    ] {
        let gradients = loss.unwrap().sum_all().unwrap().backward().unwrap();
        let gradient = gradients.get(&context).unwrap();
        assert!(
            gradient
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                > 0.0
        );
        assert!(
            unet.weights()
                .0
                .values()
                .all(|weight| gradients.get(weight).is_none())
        );
    }
    let without = unet
        .forward(&latents, &[3.0, 700.0], &random(&[1, 10, 24], 2))
        .unwrap();
    assert!(
        !without.track_op(),
        "a pass without gradients keeps its graph"
    );
}

/// Of f32, in half precision: what comes out is f32 and near, what is trained keeps its type, and weights take half.
#[test]
fn half_precision_is_near() {
    for (backend, precision, tolerance) in [
        (Backend::Host, Precision::Bf16, 0.03),
        (Backend::Device, Precision::Bf16, 0.05),
        (Backend::Device, Precision::F16, 0.01),
    ] {
        backend.within(|| half_precision_is_near_here(backend, precision, tolerance));
    }
    let error = small::unet().with_precision(Precision::F16).unwrap_err();
    assert!(error.to_string().contains("choose bf16"), "{error}");
}

fn half_precision_is_near_here(backend: Backend, precision: Precision, tolerance: f32) {
    let latents = random(&[2, 4, 16, 16], 1);
    let run = |unet: &UNet| {
        let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
        let watch = Watch::Layers(&[13], &[4]);
        let (observed, backward) = unet
            .forward_for_gradients(&latents, &[3.0, 700.0], &context, watch)
            .unwrap();
        let seen = &observed.attention[0].probabilities;
        let square = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap();
        let loss = (square(&observed.prediction) + square(seen)).unwrap();
        let gradients = backward.gradients(&loss, &[&context]).unwrap();
        let gradient = gradients.into_iter().next().unwrap().unwrap();
        [observed.prediction.detach(), seen.detach(), gradient]
    };
    let expected = run(&small::unet());
    for memory in [Memory::Fast, Memory::Lean] {
        let unet = small::unet().with_precision(precision).unwrap();
        let unet = unet.with_memory(memory);
        let weights = unet.weights().in_rows().unwrap().0;
        let halves = weights.values().filter(|w| w.dtype() == precision.dtype());
        let n_matrices = weights.values().filter(|w| w.rank() >= 2).count();
        match backend {
            Backend::Host => assert_eq!(halves.count(), n_matrices),
            Backend::Device => assert_eq!(halves.count(), weights.len()),
        }
        for (found, expected) in run(&unet).iter().zip(&expected) {
            assert_eq!(found.dtype(), DType::F32);
            let largest = distance(expected, &expected.zeros_like().unwrap());
            let error = distance(found, expected) / largest;
            assert!(error > 0.0, "{precision:?} on {backend:?} rounds nothing");
            assert!(error < tolerance, "{precision:?} on {backend:?}: {error}");
        }
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Where a processor multiplies bf16, weights lie in another order in memory: nobody else may see it.
#[test]
fn the_order_of_weights_in_memory_changes_nothing() {
    let mut config = small::config().unet;
    config.block_out_channels = vec![64, 128, 128];
    config.cross_attention_dim = 64;
    let weights = WeightMap::random(3, |w| UNet::build(&config, w)).unwrap();
    let unet = UNet::new(&config, &weights, None).unwrap();
    let unet = unet.with_precision(Precision::Bf16).unwrap();
    let in_rows = unet.weights().in_rows().unwrap();
    let shape = |(name, weight): (&String, &Tensor)| (name.clone(), weight.dims().to_vec());
    assert!(in_rows.0.iter().map(shape).eq(weights.0.iter().map(shape)));
    let plain = UNet::new(&config, &in_rows, None).unwrap().like(&unet);

    let latents = random(&[1, 4, 16, 16], 1);
    let run = |unet: &UNet| {
        let context = Var::from_tensor(&random(&[1, 77, 64], 2)).unwrap();
        let (observed, backward) = unet
            .forward_for_gradients(&latents, &[700.0], &context, Watch::NOTHING)
            .unwrap();
        let loss = observed.prediction.sqr().unwrap().sum_all().unwrap();
        let gradients = backward.gradients(&loss, &[&context]).unwrap();
        let gradient = gradients.into_iter().next().unwrap().unwrap();
        [observed.prediction.detach(), gradient].map(|x| bits(&x))
    };
    assert!(run(&unet) == run(&plain), "a step");
    Backend::Device.within(|| assert!(run(&unet) == run(&plain), "on a device"));

    let same = |what: &str, [a, b]: [WeightMap; 2]| {
        let [a, b] = [a, b].map(|weights| weights.in_rows().unwrap().0);
        assert_eq!(a.len(), b.len());
        for ((name, a), b) in a.iter().zip(b.values()) {
            assert_eq!(a.dims(), b.dims(), "{what}: {name}");
            let [a, b] = [a, b].map(|x| bits(&x.to_dtype(DType::F32).unwrap()));
            assert!(a == b, "{what}: {name}");
        }
    };
    let both = [&unet, &plain];
    let is_trained = |name: &str| name.contains("attn2");
    same(
        "trained",
        both.map(|unet| unet.weights().trainable(is_trained).unwrap().0),
    );
    let mut adapter = LoraAdapter::new(unet.weights(), 4, 4.0, 5).unwrap();
    for factors in adapter.factors.values_mut() {
        factors.up = random(factors.up.dims(), 6);
    }
    same(
        "merged",
        both.map(|unet| adapter.merged(unet.weights()).unwrap()),
    );
    let adapted = both.map(|unet| {
        let adapted = UNet::new(&config, unet.weights(), Some(&adapter)).unwrap();
        run(&adapted.like(unet))
    });
    assert!(adapted[0] == adapted[1], "with an adapter");
    let files = both.map(|unet| encode_tensors(&unet.weights().0, &BTreeMap::new()).unwrap());
    assert!(files[0] == files[1], "a file");
    let again = unet.with_precision(Precision::F32).unwrap();
    same("f32", [again.weights().clone(), in_rows]);
    let is_words = |weight: &Tensor| weight.dtype() == DType::U32;
    assert!(!again.weights().0.values().any(is_words));
}

#[test]
fn the_slope_along_the_context_is_that_of_finite_differences() {
    for_every_backend(the_slope_along_the_context_is_that_of_finite_differences_here);
}

fn the_slope_along_the_context_is_that_of_finite_differences_here() {
    let unet = small::unet();
    let (latents, start, direction) = (
        random(&[1, 4, 8, 8], 1),
        random(&[1, 10, 24], 2),
        random(&[1, 10, 24], 3),
    );
    let value = |context: &Tensor| {
        let watch = Watch::All(&[4]);
        let observed = unet
            .forward_observed(&latents, &[321.0], context, watch)
            .unwrap();
        let mut loss = observed.prediction.sqr().unwrap().mean_all().unwrap();
        for layer in observed.attention {
            loss = (loss + layer.probabilities.sqr().unwrap().mean_all().unwrap()).unwrap();
        }
        loss
    };
    let variable = Var::from_tensor(&start).unwrap();
    let gradients = value(&variable).backward().unwrap();
    let gradient = gradients.get(&variable).unwrap();
    let slope: f32 = (gradient * &direction)
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar()
        .unwrap();
    let at = |step: f64| -> f32 {
        value(&(&start + (&direction * step).unwrap()).unwrap())
            .to_scalar()
            .unwrap()
    };
    let difference = (at(0.01) - at(-0.01)) / 0.02;
    assert!(
        (slope - difference).abs() < 0.01 * slope.abs(),
        "{slope} and {difference}"
    );
}

#[test]
fn the_vae_is_that_of_candle_transformers() {
    for (use_quant_conv, layers_per_block) in [(true, 2), (false, 1)] {
        let config = VaeConfig {
            block_out_channels: vec![16, 32, 32],
            layers_per_block,
            norm_num_groups: 8,
            use_quant_conv,
            use_post_quant_conv: use_quant_conv,
            ..small::config().vae
        };
        let weights = WeightMap::random(9, |w| Vae::new(&config, w).map(drop)).unwrap();
        let own = weights.build("own", |w| Vae::new(&config, w)).unwrap();
        let by_candle = weights.build("candle", |w| Vae::by_candle(&config, w));
        let by_candle = by_candle.unwrap();
        let image = random(&[2, 3, 24, 40], 0);
        let [a, b] = [&own, &by_candle].map(|vae| vae.moments(&image).unwrap());
        assert_eq!(a.mean.dims(), [2, config.latent_channels, 6, 10]);
        let apart = [distance(&a.mean, &b.mean), distance(&a.std, &b.std)];
        assert!(apart.iter().all(|&d| d < 1e-5), "{apart:?}");
        let z = random(&[2, config.latent_channels, 6, 10], 1);
        let [a, b] = [&own, &by_candle].map(|vae| vae.decode(&z).unwrap());
        assert_eq!(a.dims(), [2, 3, 24, 40]);
        assert!(distance(&a, &b) < 1e-4, "{}", distance(&a, &b));
    }
}

#[test]
fn misfits_name_their_argument() {
    let unet = small::unet();
    let (latents, context) = (random(&[2, 4, 8, 8], 1), random(&[2, 10, 24], 2));
    let refused =
        |latents: &Tensor, timesteps: &[f32], context: &Tensor, watch: Watch<'_>| match unet
            .forward_observed(latents, timesteps, context, watch)
            .unwrap_err()
        {
            Error::Argument { what, .. } => what,
            other => panic!("{other}"),
        };
    let all = Watch::All(&[0]);
    assert_eq!(
        refused(&random(&[2, 3, 8, 8], 1), &[1.0, 2.0], &context, all),
        "latents"
    );
    assert_eq!(refused(&latents, &[1.0], &context, all), "timesteps");
    assert_eq!(
        refused(&latents, &[1.0, 2.0], &random(&[3, 10, 24], 1), all),
        "context"
    );
    assert_eq!(
        refused(&latents, &[1.0, 2.0], &random(&[2, 10, 23], 1), all),
        "context"
    );
    assert_eq!(
        refused(&latents, &[1.0, 2.0], &context, Watch::All(&[10])),
        "position"
    );
    assert_eq!(
        refused(&latents, &[1.0, 2.0], &context, Watch::Layers(&[14], &[0])),
        "layer"
    );
}

#[test]
fn a_damaged_checkpoint_is_reported_in_full() {
    let unet = small::unet();
    let mut weights = unet.weights().clone();
    weights.0.remove("conv_in.bias");
    weights.0.insert(
        "surplus".into(),
        Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    weights.0.insert("conv_out.bias".into(), random(&[5], 0));
    let Err(Error::Checkpoint(report)) = UNet::new(unet.config(), &weights, None) else {
        panic!("accepted")
    };
    assert_eq!(report.missing, ["conv_in.bias"]);
    assert_eq!(report.unexpected, ["surplus"]);
    assert_eq!(report.misshapen[0].name, "conv_out.bias");
}
