//! Every way in which the input can be wrong, one sentence each.

/// What the caller got wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CrfError {
    /// Width or height is zero.
    #[error("a picture of {width}x{height} pixels has nothing to label")]
    EmptyPicture {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// More pixels than 32-bit indices can address.
    #[error("a picture of {width}x{height} pixels is too large for the lattice's 32-bit indices")]
    PictureTooLarge {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// The color buffer does not hold `width * height * 3` bytes.
    #[error(
        "a picture of {width}x{height} pixels takes {expected} RGB bytes, but {actual} were given"
    )]
    PictureSize {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// `width * height * 3`.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// A feature is not finite, or so many standard deviations from zero that its key does not fit 16 bits.
    #[error(
        "feature {index} lies too many standard deviations from zero for the lattice's 16-bit keys: raise the standard deviations or shrink the picture"
    )]
    FeatureRange {
        /// Which feature, i.e. which pixel, row by row.
        index: usize,
    },
    /// A standard deviation that is not a positive number.
    #[error("{name} must be a positive number, but it is {value}")]
    StandardDeviation {
        /// The field of the configuration.
        name: &'static str,
        /// Its value.
        value: f32,
    },
    /// A weight that is negative or not a number.
    #[error("{name} must be zero or a positive number, but it is {value}")]
    Weight {
        /// The field of the configuration.
        name: &'static str,
        /// Its value.
        value: f32,
    },
    /// There is no label to choose.
    #[error("at least one label is needed")]
    NoLabels,
    /// More labels than one pixel's row of values holds.
    #[error("{n_labels} labels were given, but at most {max} fit one picture")]
    TooManyLabels {
        /// Labels given.
        n_labels: usize,
        /// [`MAX_LABELS`](crate::MAX_LABELS).
        max: usize,
    },
    /// The label planes do not cover the picture.
    #[error(
        "{n_labels} labels on {n_pixels} pixels take {expected} values, but {actual} were given"
    )]
    PlaneSize {
        /// Labels L.
        n_labels: usize,
        /// Pixels H·W.
        n_pixels: usize,
        /// `n_labels * n_pixels`.
        expected: usize,
        /// Values given.
        actual: usize,
    },
    /// The planes do not divide into equal ones.
    #[error("{actual} values do not divide into {n_labels} label planes of equal size")]
    UnevenPlanes {
        /// Labels L.
        n_labels: usize,
        /// Values given.
        actual: usize,
    },
    /// NaN or infinity among the input values.
    #[error("the value {value} of label {label} at pixel {pixel} is not a finite number")]
    NotFinite {
        /// Label index.
        label: usize,
        /// Pixel index, row by row.
        pixel: usize,
        /// What stood there.
        value: f32,
    },
}
