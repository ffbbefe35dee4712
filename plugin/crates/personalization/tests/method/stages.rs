//! What each stage changes and what it leaves as it is; the losses.

use super::*;

#[test]
fn a_token_of_one_piece_starts_as_its_word() {
    let model = model();
    let size = Size::square(model.image_size());
    let picture = Picture::from_rgb8(size, &vec![90; size.area() * 3], size).unwrap();
    let one = ScenePicture {
        picture,
        concepts: vec![0],
    };
    let scene = Scene::new(vec![concept("<a>", "a", Role::Object)], vec![one]).unwrap();
    let config = EmConfig::paper();
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let learned = initial(&model, &prepared, &config, 0);
    let encode = |text: &str, rows| {
        let ids = learned.tokenizer(&model).unwrap().encode(text).unwrap().ids;
        bits(&model.text_encoder.encode(&ids, rows).unwrap())
    };
    assert_eq!(
        encode("a photo of <a>", Some(&learned.rows)),
        encode("a photo of a", None)
    );
}

#[test]
fn inversion_moves_the_tokens_and_starts_a_new_optimizer() {
    let (model, mut config) = (model(), short());
    config.tokens.init = TokenInit::Inversion { steps: 2 };
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let learned = initial(&model, &prepared, &config, 1);
    assert_ne!(bits(&learned.rows), bits(&learned.initial_rows));
    assert_eq!((learned.step, learned.optimizer.t), (0, 0));
}

#[test]
fn the_joint_stage_changes_its_own_weights_and_no_others() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let outcome = run(&model, &scene, &config);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let base = model.unet.weights().clone();
    for scope in [
        JointScope::Full,
        JointScope::KeyValue,
        JointScope::Lora { rank: 2 },
    ] {
        let joint = JointConfig {
            steps: 2,
            learning_rate: 1e-3,
            scope,
            ..JointConfig::break_a_scene()
        };
        let (tuned, learned) = tune(&model, &prepared, &outcome, &joint, &config);
        assert_ne!(bits(&learned.rows), bits(&outcome.learned.rows));
        for (name, weight) in &base.0 {
            assert_eq!(
                bits(weight),
                bits(&model.unet.weights().0[name]),
                "the base model's {name} was written"
            );
            let same = bits(weight) == bits(&tuned.unet.weights().0[name]);
            let trained = match scope {
                JointScope::Full => true,
                JointScope::KeyValue => name.contains("attn2.to_k") || name.contains("attn2.to_v"),
                JointScope::Lora { .. } => false,
            };
            assert_eq!(same, !trained, "{scope:?}: {name}");
            assert!(
                !tuned.unet.weights().0[name].is_variable(),
                "{name} is still a variable"
            );
        }
        let moved = tuned
            .lora
            .iter()
            .flat_map(|lora| lora.factors.values())
            .filter(|factors| bits(&factors.up).iter().any(|&v| v != 0));
        assert_eq!(moved.count() > 0, matches!(scope, JointScope::Lora { .. }));
    }
}

/// With f16 the loss is scaled on its way back; what is trained is f32 in any case.
#[test]
fn half_precision_learns_as_f32_does() {
    let config = short();
    let learn = |backend: Backend, precision: Precision| {
        backend.within(|| {
            let model = model().with_precision(precision).unwrap();
            let scene = scene(&model);
            let outcome = run(&model, &scene, &config);
            let prepared = PreparedScene::new(&model, &scene).unwrap();
            let tuned = [JointScope::KeyValue, JointScope::Lora { rank: 2 }].map(|scope| {
                let joint = JointConfig {
                    steps: 2,
                    scope,
                    ..JointConfig::break_a_scene()
                };
                let (tuned, learned) = tune(&model, &prepared, &outcome, &joint, &config);
                for (name, weight) in &tuned.unet.weights().0 {
                    if scope == JointScope::KeyValue && name.contains("attn2.to_k.weight") {
                        assert_eq!(weight.dtype(), DType::F32, "{name} was trained");
                    }
                }
                learned.rows
            });
            [
                &[outcome.learned.initial_rows, outcome.learned.rows],
                &tuned[..],
            ]
            .concat()
        })
    };
    let largest = |a: &Tensor, b: &Tensor| -> f32 {
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        difference.max(0).unwrap().to_scalar().unwrap()
    };
    let expected = learn(Backend::Host, Precision::F32);
    for (backend, precision) in [
        (Backend::Host, Precision::Bf16),
        (Backend::Device, Precision::Bf16),
        (Backend::Device, Precision::F16),
    ] {
        let found = learn(backend, precision);
        for (stage, (found, expected_rows)) in found.iter().zip(&expected).enumerate().skip(1) {
            assert_eq!(found.dtype(), DType::F32);
            let moved = largest(expected_rows, &expected[0]);
            let error = largest(found, expected_rows);
            // Adam's first steps have the sign of a gradient: one near zero may go the other way.
            assert!(
                error.is_finite() && error <= 2.0 * moved,
                "{precision:?} {stage}: {error} of {moved}"
            );
            let mean = |rows: &Tensor| -> f32 {
                let step = (rows - &expected[0]).unwrap();
                let along = (step * (expected_rows - &expected[0]).unwrap()).unwrap();
                along.sum_all().unwrap().to_scalar().unwrap()
            };
            let agreement = mean(found) / mean(expected_rows);
            assert!(
                agreement > 0.8,
                "{precision:?} on {backend:?}, {stage}: {agreement}"
            );
        }
    }
}

#[test]
fn given_masks_may_overlap_and_empty_ones_are_refused() {
    let (model, config) = (model(), short());
    let scene = scene(&model);
    let prepared = PreparedScene::new(&model, &scene).unwrap();
    let size = |picture: usize| scene.pictures()[picture].picture.size();
    let full = |picture: usize, n: usize, v: u8| {
        let size = size(picture);
        personalization::ImageMasks::new(size, vec![vec![v; size.area()]; n]).unwrap()
    };
    let learned = initial(&model, &prepared, &config, 1);
    let overlapping = vec![full(0, 3, 1), full(1, 2, 1)];
    m_step(
        &model,
        &prepared,
        &overlapping,
        &learned,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap();
    let empty = vec![full(0, 3, 0), full(1, 2, 1)];
    let refused = m_step(
        &model,
        &prepared,
        &empty,
        &learned,
        &config.m_step,
        1,
        &mut Silent,
    )
    .unwrap_err();
    assert!(
        refused.to_string().contains("in picture 1 is empty"),
        "{refused}"
    );
    let given = EmConfig {
        masks: MaskMode::Given,
        ..config
    };
    let refused = em(&model, &prepared, EmStart::Fresh, &given, 1, &mut Silent).unwrap_err();
    assert!(refused.to_string().contains("needs masks"), "{refused}");
}

/// Central differences of a scalar function against its gradient, relative to the largest component.
fn check_gradient(start: &Tensor, f: &dyn Fn(&Tensor) -> Tensor) {
    let var = Var::from_tensor(start).unwrap();
    let gradient = f(var.as_tensor())
        .backward()
        .unwrap()
        .get(var.as_tensor())
        .unwrap()
        .flatten_all()
        .unwrap();
    let gradient = gradient.to_vec1::<f32>().unwrap();
    let values = start.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let at = |i: usize, h: f32| {
        let mut moved = values.clone();
        moved[i] += h;
        let moved = Tensor::from_vec(moved, start.dims(), &Device::Cpu).unwrap();
        f64::from(f(&moved).to_scalar::<f32>().unwrap())
    };
    let scale = gradient.iter().map(|g| g.abs()).fold(1e-6, f32::max);
    for (i, gradient) in gradient.iter().enumerate() {
        let numeric = ((at(i, 1e-3) - at(i, -1e-3)) / 2e-3) as f32;
        assert!(
            (numeric - gradient).abs() < 0.01 * scale,
            "{i}: {numeric} against {gradient}"
        );
    }
}

#[test]
fn both_losses_have_the_gradient_of_their_formula() {
    let tensor = |n: usize, f: &dyn Fn(usize) -> f32, shape: &[usize]| {
        Tensor::from_vec((0..n).map(f).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    };
    let wave = |i: usize| (i as f32 * 1.7).sin();
    let target = tensor(32, &|i| (i as f32 * 0.9).cos(), &[1, 2, 4, 4]);
    let union = tensor(16, &|i| f32::from(u8::from(i % 3 == 0)), &[1, 1, 4, 4]);
    let prediction = tensor(32, &wave, &[1, 2, 4, 4]);
    let value = masked_diffusion_loss(&prediction, &target, &union)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let inside = |i: usize| (i % 16).is_multiple_of(3);
    let by_hand: f32 = (0..32)
        .filter(|&i| inside(i))
        .map(|i| (wave(i) - (i as f32 * 0.9).cos()).powi(2))
        .sum();
    assert!((value - by_hand / 32.0).abs() < 1e-6, "{value}");
    check_gradient(&prediction, &|x| {
        masked_diffusion_loss(x, &target, &union).unwrap()
    });

    // Two samples, nine pixels, two concepts; maps as a softmax leaves them.
    let maps = tensor(36, &|i| 0.2 + 0.1 * wave(i), &[2, 9, 2]);
    let masks = tensor(18, &|i| f32::from(u8::from(i % 4 == 1)), &[9, 2]);
    let value = cross_attention_loss(&maps, &masks)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let map = |b: usize, p: usize, c: usize| 0.2 + 0.1 * wave(b * 18 + p * 2 + c);
    let mut by_hand = 0.0;
    for (b, c) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let largest = (0..9).map(|p| map(b, p, c)).fold(0.0, f32::max);
        let mask = |p: usize| f32::from(u8::from((p * 2 + c) % 4 == 1));
        by_hand += (0..9)
            .map(|p| (map(b, p, c) / largest - mask(p)).powi(2))
            .sum::<f32>()
            / 9.0
            / 2.0;
    }
    assert!((value - by_hand).abs() < 1e-5, "{value} {by_hand}");
    check_gradient(&maps, &|x| cross_attention_loss(x, &masks).unwrap());
}
