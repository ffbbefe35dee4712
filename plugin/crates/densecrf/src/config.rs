//! The constants of the model. A weight of zero switches a kernel off; it then costs nothing.

use crate::CrfError;

/// `w · exp(-|p_i - p_j|² / 2σ_xy²)`: neighbors like the same label, whatever their colors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Smoothness {
    /// Potts weight `w`, ≥ 0.
    pub weight: f32,
    /// `σ_xy` in pixels, > 0.
    pub xy_std: f32,
}

/// `w · exp(-|p_i - p_j|² / 2σ_xy² - |I_i - I_j|² / 2σ_rgb²)`: pixels of one color like the same label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Appearance {
    /// Potts weight `w`, ≥ 0.
    pub weight: f32,
    /// `σ_xy` in pixels, > 0.
    pub xy_std: f32,
    /// `σ_rgb` in steps of 0..=255, > 0.
    pub rgb_std: f32,
}

/// Constants of one dense CRF.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrfConfig {
    /// Mean-field iterations; 0 returns the softmax of the unary energies.
    pub iterations: usize,
    /// The kernel over positions.
    pub smoothness: Smoothness,
    /// The kernel over positions and colors.
    pub appearance: Appearance,
}

impl CrfConfig {
    /// The constants of CutLER (Wang et al. 2023, `maskcut/crf.py`: `MAX_ITER`, `POS_W`, `POS_XY_STD`, `Bi_W`,
    /// `Bi_XY_STD`, `Bi_RGB_STD`), which the method takes over. Stated for pictures of about 512 pixels; they also
    /// did better unscaled on smaller ones.
    pub const fn cutler() -> Self {
        Self {
            iterations: 10,
            smoothness: Smoothness {
                weight: 7.0,
                xy_std: 3.0,
            },
            appearance: Appearance {
                weight: 10.0,
                xy_std: 50.0,
                rgb_std: 5.0,
            },
        }
    }

    /// Constants of the caller's choice.
    ///
    /// # Errors
    /// [`CrfError::StandardDeviation`] or [`CrfError::Weight`] for a constant out of its range.
    pub fn new(
        iterations: usize,
        smoothness: Smoothness,
        appearance: Appearance,
    ) -> Result<Self, CrfError> {
        let config = Self {
            iterations,
            smoothness,
            appearance,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks every range; [`DenseCrf::new`](crate::DenseCrf::new) does so again.
    ///
    /// # Errors
    /// As [`CrfConfig::new`].
    pub fn validate(&self) -> Result<(), CrfError> {
        let weights = [
            ("smoothness.weight", self.smoothness.weight),
            ("appearance.weight", self.appearance.weight),
        ];
        for (name, value) in weights {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(CrfError::Weight { name, value });
            }
        }
        let stds = [
            ("smoothness.xy_std", self.smoothness.xy_std),
            ("appearance.xy_std", self.appearance.xy_std),
            ("appearance.rgb_std", self.appearance.rgb_std),
        ];
        for (name, value) in stds {
            if !(value > 0.0 && value.is_finite()) {
                return Err(CrfError::StandardDeviation { name, value });
            }
        }
        Ok(())
    }
}
