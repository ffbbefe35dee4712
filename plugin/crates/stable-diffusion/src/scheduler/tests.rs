use candle_core::{DType, Device, Tensor};

use super::*;
use crate::config::ModelConfig;
use crate::noise_schedule::NoiseSchedule;
use crate::rng::Rng;

fn config(spacing: Option<TimestepSpacing>) -> SchedulerConfig {
    SchedulerConfig {
        timestep_spacing: spacing,
        ..ModelConfig::sd_1_5().scheduler
    }
}

#[test]
fn timesteps_are_those_of_diffusers() {
    use SchedulerKind::{Ddim, DpmSolverPlusPlus2M as Dpm};
    use TimestepSpacing::{Leading, Linspace, Trailing};
    // Printed by diffusers 0.42.1 with steps_offset = 1.
    let cases: [(SchedulerKind, TimestepSpacing, &[usize]); 6] = [
        (Ddim, Leading, &[853, 711, 569, 427, 285, 143, 1]),
        (Ddim, Trailing, &[999, 856, 713, 570, 428, 285, 142]),
        (Ddim, Linspace, &[999, 832, 666, 500, 333, 166, 0]),
        (Dpm, Leading, &[876, 751, 626, 501, 376, 251, 126]),
        (Dpm, Trailing, &[999, 856, 713, 570, 428, 285, 142]),
        (Dpm, Linspace, &[999, 856, 714, 571, 428, 285, 143]),
    ];
    for (kind, spacing, expected) in cases {
        let scheduler = kind.build(&config(Some(spacing)), expected.len()).unwrap();
        assert_eq!(scheduler.timesteps(), expected, "{kind:?} {spacing:?}");
    }
    let default = |kind: SchedulerKind| kind.build(&config(None), 7).unwrap().timesteps().to_vec();
    assert_eq!(default(Ddim), cases[0].2);
    assert_eq!(default(Dpm), cases[5].2);
}

#[test]
fn numbers_of_steps_are_checked() {
    for kind in [SchedulerKind::Ddim, SchedulerKind::DpmSolverPlusPlus2M] {
        assert!(kind.build(&config(None), 1).is_ok());
        for steps in [0, 1001] {
            assert!(
                kind.build(&config(None), steps).is_err(),
                "{kind:?} {steps}"
            );
        }
    }
    // 1000 steps from offset 1 would start at timestep 1000, which is one too many.
    let error = SchedulerKind::Ddim
        .build(&config(None), 1000)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        "steps: 1000 steps would start at timestep 1000, the model has 1000: take fewer"
    );
}

/// A model that knows the answer is followed exactly, whatever the sampler, step count or prediction:
/// each step lands on the forward process's latent of the next timestep.
#[test]
fn a_perfect_prediction_is_followed_exactly() {
    let device = Device::Cpu;
    let mut rng = Rng::new(3, "test", 0);
    let z = rng.normal(&[1, 4, 3, 3], &device).unwrap();
    let eps = rng.normal(&[1, 4, 3, 3], &device).unwrap();
    for kind in [SchedulerKind::Ddim, SchedulerKind::DpmSolverPlusPlus2M] {
        for prediction in [Prediction::Epsilon, Prediction::Velocity] {
            for (steps, spacing) in [
                (1, None),
                (2, None),
                (10, None),
                (20, Some(TimestepSpacing::Leading)),
            ] {
                let config = SchedulerConfig {
                    prediction,
                    ..config(spacing)
                };
                let schedule = NoiseSchedule::new(&config);
                let mut scheduler = kind.build(&config, steps).unwrap();
                let timesteps = scheduler.timesteps().to_vec();
                let mut sample = schedule.add_noise(&z, &eps, &timesteps[..1]).unwrap();
                for (i, &t) in timesteps.iter().enumerate() {
                    let output = schedule.target(&z, &eps, &[t]).unwrap();
                    let stepped = scheduler.step(&output, i, &sample).unwrap();
                    let error = max_error(&stepped.clean, &z);
                    assert!(
                        error < 2e-4,
                        "{kind:?} {prediction:?}, x0 of step {i}: {error}"
                    );
                    sample = stepped.sample;
                    if let Some(&next) = timesteps.get(i + 1) {
                        let expected = schedule.add_noise(&z, &eps, &[next]).unwrap();
                        let error = max_error(&sample, &expected);
                        assert!(
                            error < 2e-4,
                            "{kind:?} {prediction:?} {steps} steps, step {i}: {error}"
                        );
                    }
                }
                // DDIM ends at abar of timestep 0, DPM-Solver at the clean latent.
                let expected = match kind {
                    SchedulerKind::Ddim => schedule.add_noise(&z, &eps, &[0]).unwrap(),
                    SchedulerKind::DpmSolverPlusPlus2M => z.clone(),
                };
                assert!(
                    max_error(&sample, &expected) < 2e-4,
                    "{kind:?} {prediction:?} {steps} steps"
                );
            }
        }
    }
}

#[test]
fn ddim_clips_and_ends_at_one_if_told_to() {
    let config = SchedulerConfig {
        clip_sample: true,
        set_alpha_to_one: true,
        ..config(None)
    };
    let mut ddim = Ddim::new(&config, 1).unwrap();
    let sample = Tensor::full(100_f32, (1, 4, 1, 1), &Device::Cpu).unwrap();
    let eps = Tensor::zeros((1, 4, 1, 1), DType::F32, &Device::Cpu).unwrap();
    let end = ddim.step(&eps, 0, &sample).unwrap().sample;
    assert_eq!(
        end.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        [1.0; 4]
    );
}

#[test]
fn a_schedule_that_ends_at_pure_noise_stays_finite() {
    let config = SchedulerConfig {
        rescale_betas_zero_snr: true,
        timestep_spacing: Some(TimestepSpacing::Trailing),
        ..ModelConfig::sd_2_1().scheduler
    };
    for kind in [SchedulerKind::Ddim, SchedulerKind::DpmSolverPlusPlus2M] {
        let mut scheduler = kind.build(&config, 4).unwrap();
        let mut sample = Rng::new(4, "test", 0)
            .normal(&[1, 4, 2, 2], &Device::Cpu)
            .unwrap();
        for i in 0..4 {
            sample = scheduler
                .step(&(&sample * 0.5).unwrap(), i, &sample)
                .unwrap()
                .sample;
        }
        assert!(
            sample
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|x| x.is_finite()),
            "{kind:?}"
        );
    }
}

fn max_error(a: &Tensor, b: &Tensor) -> f32 {
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar()
        .unwrap()
}
