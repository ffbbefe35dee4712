//! What is held, and when it is let go: measured by an allocator that counts.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[expect(dead_code, reason = "other tests use the rest of it")]
mod small;

use std::{any::Any, sync::Mutex};

use candle_core::{Tensor, Var};
use peak_alloc::PeakAlloc;
use small::random;
use stable_diffusion::{
    ops::{self, Backend, Mask},
    unet::{Observed, Watch},
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One measurement at a time.
static MEASURING: Mutex<()> = Mutex::new(());

const BACKENDS: [Backend; 2] = [Backend::Host, Backend::Device];

/// Bytes that some work adds at its highest, and leaves.
fn measured(work: impl FnOnce()) -> (usize, usize) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    work();
    let above = |bytes: usize| bytes.saturating_sub(before);
    (
        above(ALLOCATOR.peak_usage()),
        above(ALLOCATOR.current_usage()),
    )
}

#[test]
fn an_attention_map_is_never_built_whole() {
    let _alone = MEASURING.lock();
    let n = 8192;
    let whole = n * n * size_of::<f32>();
    let operands = [0, 1, 2].map(|i| Var::from_tensor(&random(&[1, n, 8], i)).unwrap());
    for backend in BACKENDS {
        let (peak, _) = measured(|| {
            backend.within(|| {
                let [q, k, v] = &operands;
                let y = ops::attention(q, k, v, 1, Mask::None).unwrap();
                y.sum_all().unwrap().backward().unwrap();
            });
        });
        assert!(peak < whole, "{backend:?}: {peak} of {whole} bytes");
    }
}

#[test]
fn no_graph_outlives_its_step_and_frozen_weights_have_no_gradients() {
    let _alone = MEASURING.lock();
    let unet = small::unet();
    let n_weights: usize = unet.weights().0.values().map(Tensor::elem_count).sum();
    let context = Var::from_tensor(&random(&[1, 10, 24], 2)).unwrap();
    let latents = random(&[2, 4, 16, 16], 1);
    let watch = Watch::Layers(&[13], &[4]);
    let loss = |observed: Observed| observed.prediction.sqr().unwrap().sum_all().unwrap();
    // Whatever comes out of a step is held.
    let in_graph = || -> Box<dyn Any> {
        let observed = unet.forward_observed(&latents, &[3.0, 700.0], &context, watch);
        Box::new(loss(observed.unwrap()).backward().unwrap())
    };
    let on_record = || -> Box<dyn Any> {
        let pass = unet.forward_for_gradients(&latents, &[3.0, 700.0], &context, watch);
        let (observed, backward) = pass.unwrap();
        let loss = loss(observed);
        Box::new(backward.gradients(&loss, &[&context]).unwrap())
    };
    let steps: [&dyn Fn() -> Box<dyn Any>; 2] = [&in_graph, &on_record];
    for (backend, step) in BACKENDS.iter().flat_map(|b| steps.map(|step| (b, step))) {
        backend.within(|| {
            // What threads keep for the next time is not the step's. Which thread of the pool a step meets is a matter of
            // chance, so the least of several is what every step holds.
            drop(step());
            let least = |held: &dyn Fn() -> usize| (0..8).map(|_| held()).min().unwrap();
            let kept = least(&|| {
                let mut gradients = None;
                measured(|| gradients = Some(step())).1
            });
            assert!(
                kept < n_weights,
                "{backend:?}: {kept} bytes are kept for gradients, {n_weights} weights are frozen"
            );
            let left = least(&|| measured(|| drop(step())).1);
            assert!(
                left < 1 << 12,
                "{backend:?}: {left} bytes are left of a step"
            );
        });
    }
}
