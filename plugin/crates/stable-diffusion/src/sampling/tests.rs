use candle_core::{Device, Tensor};

use super::*;
use crate::config::ModelConfig;
use crate::noise_schedule::NoiseSchedule;
use crate::rng::Rng;

/// Of the samplers that do not visit σ = 0.
const TOLERANCE: f32 = 5e-3;

/// A model that knows the answer.
struct Known {
    answer: Tensor,
    noise: Rng,
    /// σ of every question.
    asked: Vec<f64>,
    steps: usize,
    last: usize,
}

impl Problem for Known {
    fn clean(&mut self, _: &Tensor, sigma: f64) -> Result<Tensor> {
        self.asked.push(sigma);
        Ok(self.answer.clone())
    }
    fn noise(&mut self, x: &Tensor) -> Result<Tensor> {
        self.noise.normal(x.dims(), x.device())
    }
    fn on_step(&mut self, _: &Tensor) -> Result<()> {
        self.steps += 1;
        if self.steps == self.last {
            Err(Error::Canceled)
        } else {
            Ok(())
        }
    }
}

fn levels(config: ModelConfig) -> NoiseLevels {
    NoiseLevels::new(&NoiseSchedule::new(&config.scheduler))
}

fn run(sampler: Sampler, sigmas: &[f64], last: usize) -> (Result<Tensor>, Known) {
    let mut rng = Rng::new(3, "test", 0);
    let answer = rng.normal(&[1, 4, 3, 5], &Device::Cpu).unwrap();
    let noise = rng.normal(&[1, 4, 3, 5], &Device::Cpu).unwrap();
    let x = (&answer + (noise * sigmas[0]).unwrap()).unwrap();
    let mut problem = Known {
        answer,
        noise: rng,
        asked: Vec::new(),
        steps: 0,
        last,
    };
    (sampler.sample(&mut problem, &x, sigmas), problem)
}

fn max_error(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap();
    difference.max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn a_model_that_knows_the_answer_is_believed_by_every_sampler() {
    for levels in [levels(ModelConfig::sd_1_5()), {
        let mut config = ModelConfig::sd_2_1();
        config.scheduler.rescale_betas_zero_snr = true;
        levels(config)
    }] {
        for sampler in Sampler::ALL {
            for schedule in Schedule::ALL {
                for steps in [1, 2, 3, 10] {
                    let sigmas = sampler.noise_levels(&levels, schedule, steps, 1.0).unwrap();
                    assert_eq!(sigmas.len(), steps + 1, "{sampler:?} {schedule:?}");
                    assert!(sigmas.is_sorted_by(|a, b| a > b), "{sigmas:?}");
                    let (end, problem) = run(sampler, &sigmas, usize::MAX);
                    let error = max_error(&end.unwrap(), &problem.answer);
                    assert!(
                        error < TOLERANCE,
                        "{sampler:?} {schedule:?} {steps}: {error}"
                    );
                    assert_eq!(problem.steps, steps);
                    let first_of_steps = problem.asked.iter().filter(|s| sigmas.contains(s));
                    let per_step = if sampler == Sampler::Heun { 2 } else { 1 };
                    // Heun's last step has no second question.
                    let n_asked = per_step * steps - (per_step - 1);
                    assert_eq!(first_of_steps.count(), n_asked, "{sampler:?}");
                }
            }
        }
    }
}

#[test]
fn a_stop_ends_within_the_step() {
    let levels = levels(ModelConfig::sd_1_5());
    for sampler in Sampler::ALL {
        let sigmas = sampler
            .noise_levels(&levels, Schedule::Karras, 8, 1.0)
            .unwrap();
        let (end, problem) = run(sampler, &sigmas, 3);
        assert!(matches!(end, Err(Error::Canceled)), "{sampler:?}");
        assert!(
            problem.steps == 3 && !problem.asked.contains(&sigmas[3]) || sampler == Sampler::Heun
        );
    }
}

#[test]
fn denoise_takes_the_last_steps_of_a_longer_run() {
    let levels = levels(ModelConfig::sd_1_5());
    for sampler in [Sampler::Euler, Sampler::UniPc] {
        for schedule in Schedule::ALL {
            let of = |steps, denoise| {
                sampler
                    .noise_levels(&levels, schedule, steps, denoise)
                    .unwrap()
            };
            assert_eq!(of(10, 0.5), of(20, 1.0)[10..]);
        }
    }
    let refused = |steps, denoise| {
        let found = Sampler::Euler.noise_levels(&levels, Schedule::Normal, steps, denoise);
        found.unwrap_err().to_string()
    };
    assert_eq!(refused(0, 1.0), "steps: 0 is not in 1..=1000");
    assert_eq!(refused(1001, 1.0), "steps: 1001 is not in 1..=1000");
    assert_eq!(refused(10, 0.0), "denoise: 0 is not above 0 and at most 1");
    assert_eq!(
        refused(10, f64::NAN),
        "denoise: NaN is not above 0 and at most 1"
    );
}

#[test]
fn timesteps_and_noise_levels_are_each_others_inverse() {
    let levels = levels(ModelConfig::sd_1_5());
    // sqrt((1 - abar) / abar) of diffusers 0.42.1's alphas_cumprod[[0, 999]].
    assert!((levels.smallest() - 0.029_167_5).abs() < 1e-5);
    assert!((levels.largest() - 14.614_65).abs() < 1e-3);
    for t in 0..1000 {
        assert_eq!(levels.timestep(levels.sigma(t as f64)), t);
    }
    assert_eq!(levels.timestep(1e-9), 0);
    assert_eq!(levels.timestep(1e9), 999);
    let between = levels.sigma(10.5);
    assert!(levels.sigma(10.0) < between && between < levels.sigma(11.0));
}
