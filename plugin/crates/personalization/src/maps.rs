//! Attention maps in picture space, before any threshold.

/// Maps of one picture's concepts, in its order: `[C][size · size]`, at least 0, not normalized.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionMaps {
    /// Width and height in pixels of the picture.
    pub size: usize,
    /// One map per concept.
    pub maps: Vec<Vec<f32>>,
}
