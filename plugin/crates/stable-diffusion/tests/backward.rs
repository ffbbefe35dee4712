//! Parts of the U-Net that are computed once more give the gradients of a graph that is kept, bit for bit, and hold less
//! until then.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[expect(dead_code, reason = "other tests use the rest of it")]
mod small;

use std::sync::{Mutex, PoisonError};

use candle_core::{Tensor, Var};
use peak_alloc::PeakAlloc;
use small::random;
use stable_diffusion::{
    lora::LoraAdapter,
    memory::Memory,
    ops::{Backend, Precision},
    unet::{Observed, UNet, Watch},
    weights::WeightMap,
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One measurement at a time.
static MEASURING: Mutex<()> = Mutex::new(());

/// What is trained beside the context.
#[derive(Debug, Clone, Copy)]
enum Scope {
    Nothing,
    Lora,
    Keys,
    Everything,
}

/// A network, and its variables by name.
fn network(scope: Scope, memory: Memory) -> (UNet, Vec<(String, Var)>) {
    let config = small::config().unet;
    let weights = WeightMap::random(3, |w| UNet::build(&config, w)).unwrap();
    let (weights, lora, variables) = match scope {
        Scope::Nothing => (weights, None, Vec::new()),
        Scope::Lora => {
            let lora = LoraAdapter::new(&weights, 2, 2.0, 0).unwrap();
            // Factors that start at zero have gradients that are zero behind them.
            for (i, factors) in lora.factors.values().enumerate() {
                let up = Var::from_tensor(&factors.up).unwrap();
                let value = (random(factors.up.dims(), 100 + i as u64) * 0.1).unwrap();
                up.set(&value).unwrap();
            }
            let variables = lora.variables();
            (weights, Some(lora), variables)
        }
        Scope::Keys | Scope::Everything => {
            let is_trained =
                |name: &str| matches!(scope, Scope::Everything) || name.contains("attn2.to_k");
            let (weights, variables) = weights.trainable(is_trained).unwrap();
            (weights, None, variables)
        }
    };
    let unet = UNet::new(&config, &weights, lora.as_ref()).unwrap();
    (unet.with_memory(memory), variables)
}

/// Some loss of everything that was given.
fn loss(observed: &Observed, with_prediction: bool) -> Tensor {
    let seen = observed.attention.iter().map(|seen| {
        let probabilities = seen.probabilities.sqr().unwrap().mean_all().unwrap();
        match &seen.self_attention {
            Some(of_self) => {
                (probabilities + of_self.powf(1.5).unwrap().sum_all().unwrap()).unwrap()
            }
            None => probabilities,
        }
    });
    let seen = seen.reduce(|a, b| (a + b).unwrap());
    let error = observed.prediction.sqr().unwrap().mean_all().unwrap();
    match (seen, with_prediction) {
        (Some(seen), true) => (error + (seen * 3.0).unwrap()).unwrap(),
        (Some(seen), false) => seen,
        (None, _) => error,
    }
}

/// A step's loss, and the gradients of the context and of everything trained.
fn step(
    (unet, variables): &(UNet, Vec<(String, Var)>),
    context: &Var,
    watch: Watch<'_>,
    with_prediction: bool,
) -> (f32, Vec<Option<Tensor>>) {
    // As a text encoder leaves it: with a graph of its own.
    let text = (context.as_tensor() * 1.5).unwrap();
    let latents = random(&[2, 4, 16, 16], 1);
    let (observed, backward) = unet
        .forward_for_gradients(&latents, &[3.0, 700.0], &text, watch)
        .unwrap();
    let loss = loss(&observed, with_prediction);
    drop(observed);
    let wanted: Vec<&Tensor> = variables
        .iter()
        .map(|(_, var)| var.as_tensor())
        .chain([context.as_tensor()])
        .collect();
    let gradients = backward.gradients(&loss, &wanted).unwrap();
    (loss.to_scalar().unwrap(), gradients)
}

fn bits(gradient: &Tensor) -> Vec<u32> {
    let values = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // A zero may have either sign.
    values.iter().map(|v| (v + 0.0).to_bits()).collect()
}

fn same_bits(scope: Scope, watch: Watch<'_>, with_prediction: bool) {
    for batch in [1, 2] {
        let context = Var::from_tensor(&random(&[batch, 10, 24], 2)).unwrap();
        let step = |memory| step(&network(scope, memory), &context, watch, with_prediction);
        let (fast, lean) = (step(Memory::Fast), step(Memory::Lean));
        assert_eq!(fast.0.to_bits(), lean.0.to_bits(), "{scope:?}: losses");
        assert_eq!(fast.1.len(), lean.1.len());
        for (i, (fast, lean)) in fast.1.iter().zip(&lean.1).enumerate() {
            let (Some(fast), Some(lean)) = (fast, lean) else {
                assert!(fast.is_none() && lean.is_none(), "{scope:?}: gradient {i}");
                continue;
            };
            assert_eq!(bits(fast), bits(lean), "{scope:?}: gradient {i}");
        }
        let context = fast.1.last().unwrap().as_ref().unwrap();
        assert!(bits(context).iter().any(|&bits| bits != 0));
    }
}

fn on_both(test: impl Fn()) {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    Backend::Host.within(&test);
    Backend::Device.within(&test);
}

#[test]
fn tokens_have_the_same_gradients() {
    on_both(|| {
        same_bits(Scope::Nothing, Watch::Layers(&[], &[]), true);
        same_bits(Scope::Nothing, Watch::Layers(&[1, 2, 6, 13], &[4, 6]), true);
        same_bits(Scope::Nothing, Watch::All(&[4]), true);
        // Layers behind the last that is watched have no gradient.
        same_bits(Scope::Nothing, Watch::Layers(&[2], &[4]), false);
    });
}

#[test]
fn self_attention_that_is_watched_has_the_same_gradients() {
    on_both(|| {
        same_bits(
            Scope::Nothing,
            Watch::WithSelfAttention(&[2, 7], &[4]),
            true,
        );
    });
}

#[test]
fn trained_weights_have_the_same_gradients() {
    on_both(|| {
        let watch = Watch::Layers(&[1, 6, 13], &[4, 6]);
        for scope in [Scope::Lora, Scope::Keys, Scope::Everything] {
            same_bits(scope, watch, true);
        }
    });
}

#[test]
fn rounded_factors_stay_rounded() {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
    let step = |memory| {
        let (unet, variables) = network(Scope::Nothing, memory);
        let network = (unet.with_precision(Precision::Bf16).unwrap(), variables);
        step(&network, &context, Watch::All(&[4]), true)
    };
    let (fast, lean) = (step(Memory::Fast), step(Memory::Lean));
    let [fast, lean] = [fast, lean].map(|(_, gradients)| bits(gradients[0].as_ref().unwrap()));
    assert_eq!(fast, lean);
}

/// Bytes that some work adds at its highest.
fn peak(work: impl FnOnce()) -> usize {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    work();
    ALLOCATOR.peak_usage().saturating_sub(before)
}

/// What a step holds, on record and with its parts computed again, beside candle's graph of the same.
#[test]
fn a_step_on_record_holds_less_than_a_graph_and_one_that_computes_again_less_than_that() {
    let watch = Watch::Layers(&[1, 6, 13], &[4, 6]);
    let latents = random(&[2, 4, 16, 16], 1);
    for scope in [Scope::Nothing, Scope::Lora] {
        // The device's attention takes much for its blocks beside what this network has in all.
        for (backend, part) in [(Backend::Host, 0.25), (Backend::Device, 0.42)] {
            let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
            backend.within(|| {
                let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
                // What threads keep for the next time is not the step's.
                let held = |step: &dyn Fn()| {
                    step();
                    peak(step)
                };
                let [fast, lean] = [Memory::Fast, Memory::Lean].map(|memory| {
                    let network = network(scope, memory);
                    held(&|| drop(step(&network, &context, watch, true)))
                });
                let (unet, _variables) = network(scope, Memory::Fast);
                let graph = held(&|| {
                    let text = (context.as_tensor() * 1.5).unwrap();
                    let observed = unet.forward_observed(&latents, &[3.0, 700.0], &text, watch);
                    drop(loss(&observed.unwrap(), true).backward().unwrap());
                });
                println!("{scope:?}, {backend:?}: {graph} bytes, on record {fast}, again {lean}");
                let of_graph = |bytes: usize| bytes as f64 / graph as f64;
                assert!(
                    of_graph(lean) < part,
                    "{scope:?}, {backend:?}: {lean} of {graph}"
                );
                assert!(
                    of_graph(fast) < 0.7,
                    "{scope:?}, {backend:?}: {fast} of {graph}"
                );
            });
        }
    }
}

#[test]
fn what_a_pass_keeps_is_about_what_it_is_said_to() {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let (unet, _) = network(Scope::Nothing, Memory::Fast);
    let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
    let latents = random(&[2, 4, 32, 24], 1);
    let watch = Watch::Layers(&[], &[]);
    let pass = |context: &Tensor| {
        let before = ALLOCATOR.current_usage();
        let pass = unet.forward_for_gradients(&latents, &[3.0, 700.0], context, watch);
        let _held = pass.unwrap();
        ALLOCATOR.current_usage() - before
    };
    // What threads keep for the next time is not the pass's.
    pass(&context);
    let (kept, said) = (pass(&context) as f64, unet.kept_bytes(2, [32, 24]) as f64);
    println!("kept: {kept} bytes, said to be {said}");
    assert!((0.7..1.3).contains(&(kept / said)), "{kept} and {said}");
}
