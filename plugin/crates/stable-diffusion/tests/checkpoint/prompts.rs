//! Prompts longer than the text encoder, with weights.

use std::ops::ControlFlow::{self, Break, Continue};

use candle_core::{Device, Tensor};
use stable_diffusion::Error;
use stable_diffusion::config::ModelConfig;
use stable_diffusion::generate::{Contexts, GenerateConfig, Start, generate};
use stable_diffusion::model::DiffusionModel;
use stable_diffusion::prompt::{MAX_TOKENS, context};
use stable_diffusion::rng::Rng;
use stable_diffusion::sampling::{Sampler, Schedule};
use stable_diffusion::tokenizer::Tokenizer;

use crate::models::{shrunk, tokenizer};

fn model() -> DiffusionModel {
    DiffusionModel::random(&shrunk(ModelConfig::sd_1_5()), tokenizer(), 3, &Device::Cpu).unwrap()
}

fn encode(model: &DiffusionModel, prompt: &str) -> Tensor {
    context(
        &model.text_encoder,
        &model.tokenizer,
        prompt,
        None,
        &mut |_, _| Continue(()),
    )
    .unwrap()
}

fn plain(model: &DiffusionModel, prompt: &str) -> Tensor {
    let ids = model.tokenizer.encode(prompt).unwrap().ids;
    model.text_encoder.encode(&ids, None).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

fn n_pieces(tokenizer: &Tokenizer, text: &str) -> usize {
    tokenizer.encode(text).unwrap().n_tokens - 2
}

#[test]
fn a_plain_prompt_is_encoded_as_it_is() {
    let model = model();
    let prompt = "a dog on the grass";
    assert_eq!(
        distance(&encode(&model, prompt), &plain(&model, prompt)),
        0.0
    );
    assert_eq!(distance(&encode(&model, ""), &plain(&model, "")), 0.0);
    // Weight 1 is none.
    let same = encode(&model, "(a dog:1.0) on the grass");
    assert_eq!(distance(&same, &plain(&model, prompt)), 0.0);
}

#[test]
fn a_weight_moves_a_token_away_from_the_empty_prompt() {
    let model = model();
    let (found, full, empty) = (
        encode(&model, "a dog on (the grass:1.5)"),
        plain(&model, "a dog on the grass"),
        plain(&model, ""),
    );
    let first = 1 + n_pieces(&model.tokenizer, "a dog on");
    let weighted = first..first + n_pieces(&model.tokenizer, "the grass");
    for position in 0..77 {
        let weight = if weighted.contains(&position) {
            1.5
        } else {
            1.0
        };
        let at = |t: &Tensor| t.narrow(1, position, 1).unwrap();
        let expected =
            (at(&empty) + ((at(&full) - at(&empty)).unwrap() * weight).unwrap()).unwrap();
        assert!(distance(&at(&found), &expected) < 1e-6, "{position}");
    }
    assert!(distance(&found, &full) > 1e-3);
}

#[test]
fn a_long_prompt_is_chunks_one_behind_the_other() {
    let model = model();
    let word = "dog ";
    let each = n_pieces(&model.tokenizer, "dog");
    let first = word.repeat(75 / each);
    let prompt = format!("{first}on the grass");
    assert!(
        model.tokenizer.encode(&prompt).is_err(),
        "more than one chunk takes"
    );
    let found = encode(&model, &prompt);
    assert_eq!(found.dims()[1], 2 * 77);
    if 75 % each == 0 {
        assert_eq!(
            distance(&found.narrow(1, 0, 77).unwrap(), &plain(&model, &first)),
            0.0
        );
        assert_eq!(
            distance(
                &found.narrow(1, 77, 77).unwrap(),
                &plain(&model, "on the grass")
            ),
            0.0
        );
    }
}

#[test]
fn the_vectors_of_a_concept_stay_together() {
    let model = model();
    let placeholders: Vec<String> = (0..4).map(|k| format!("<v{k}>")).collect();
    let tokenizer = model.tokenizer.with_placeholders(&placeholders).unwrap();
    let rows = Rng::new(1, "rows", 0)
        .normal(&[4, 12], &Device::Cpu)
        .unwrap();
    let each = n_pieces(&tokenizer, "dog");
    let before = "dog ".repeat(73 / each);
    let text = placeholders.join(" ");
    let encode = |prompt: &str| {
        context(
            &model.text_encoder,
            &tokenizer,
            prompt,
            Some(&rows),
            &mut |_, _| Continue(()),
        )
        .unwrap()
    };
    let found = encode(&format!("{before}{text} grass"));
    assert_eq!(found.dims()[1], 2 * 77);
    let second = encode(&format!("{text} grass"));
    assert_eq!(distance(&found.narrow(1, 77, 77).unwrap(), &second), 0.0);
}

#[test]
fn contexts_of_different_lengths_paint_together() {
    let model = model();
    let (long, short) = (encode(&model, &"dog ".repeat(80)), encode(&model, ""));
    let config = GenerateConfig {
        steps: 2,
        guidance: 3.0,
        sampler: Sampler::Ddim,
        schedule: Schedule::Normal,
        seed: 1,
        n_pictures: 1,
        start: Start::Noise([model.image_size(); 2]),
    };
    let paint = |context: &Tensor| {
        let contexts = Contexts {
            conditional: context,
            unconditional: &short,
        };
        generate(&model, contexts, None, &config, &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap()
    };
    // Attention does not notice that a context is repeated: alone it is of another length than the negative prompt's.
    let once = encode(&model, "a dog");
    let twice = once.repeat((1, 3, 1)).unwrap();
    assert!(distance(&paint(&once), &paint(&twice)) < 1e-4);
    assert!(distance(&paint(&once), &paint(&long)) > 1e-4);
}

#[test]
fn a_prompt_has_at_most_so_many_tokens() {
    let model = model();
    let each = n_pieces(&model.tokenizer, "dog");
    let refused = "dog ".repeat(MAX_TOKENS / each + 1);
    let mut n_asked = 0;
    let error = context(
        &model.text_encoder,
        &model.tokenizer,
        &refused,
        None,
        &mut |_, _| {
            n_asked += 1;
            Continue(())
        },
    );
    let told = error.unwrap_err().to_string();
    assert!(
        told.contains("\"dog dog dog dog dog dog dog do…\"") && told.contains("at most 4800"),
        "{told}"
    );
    assert_eq!(n_asked, 0, "nothing is encoded before that is known");
}

#[test]
fn the_encoding_of_a_long_prompt_stops_when_asked() {
    let model = model();
    let mut asked = Vec::new();
    let stopped = context(
        &model.text_encoder,
        &model.tokenizer,
        &"dog ".repeat(400),
        None,
        &mut |done, total| {
            asked.push((done, total));
            if done == 2 { Break(()) } else { Continue(()) }
        },
    );
    assert!(matches!(stopped, Err(Error::Canceled)));
    let dones: Vec<_> = asked.iter().map(|(done, _)| *done).collect();
    assert_eq!(dones, [0, 1, 2]);
    assert!(asked[0].1 > 5);
}
