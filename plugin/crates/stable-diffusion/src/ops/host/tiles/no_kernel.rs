//! What stands for the instructions where there are none: a proof that nobody has.

use super::super::gemm::{MatrixMut, Write};
use super::super::numbers::Number;
use super::{
    Factors,
    block::{Left, Steps, Strip, TILE, TallSums, Used},
};

/// Proof that this processor multiplies tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tiles {}

/// Tiles that are ready.
#[derive(Debug)]
pub(crate) enum Configured {}

impl Tiles {
    pub(crate) fn get(_: Factors) -> Option<Self> {
        None
    }

    pub(crate) fn have_matrix_unit(self) -> bool {
        match self {}
    }

    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        Vec::new()
    }

    pub(crate) fn configured<R>(self, _work: impl FnOnce(&Configured) -> R) -> R {
        match self {}
    }

    pub(super) fn neighbors<const P: usize, T: Number>(
        self,
        _: &[T],
        _: usize,
        _: &mut [u32],
        _: usize,
        _: bool,
    ) {
        match self {}
    }

    pub(super) fn across<const P: usize, T: Number>(
        self,
        _: &[T],
        _: usize,
        _: &mut [u32],
        _: usize,
        _: bool,
    ) {
        match self {}
    }

    pub(super) fn neighbors_by_taps<const P: usize, T: Number>(
        self,
        _: &[T],
        _: usize,
        _: &mut [u32],
    ) {
        match self {}
    }

    pub(super) fn across_by_taps<const P: usize, T: Number>(
        self,
        _: &[T],
        _: usize,
        _: &mut [u32],
    ) {
        match self {}
    }

    pub(super) fn put_turned(
        self,
        _: &[f32; TILE],
        _: usize,
        _: Option<&[f32; 16]>,
        _: &mut MatrixMut<'_>,
        _: [usize; 2],
        _: [usize; 2],
    ) {
        match self {}
    }
}

impl Tiles {
    pub(crate) fn exponentials<const P: usize>(
        self,
        _: &[f32],
        _: usize,
        _: f32,
        _: &[f32],
        _: &mut [f32],
        _: &mut [u32],
    ) {
        match self {}
    }

    pub(crate) fn score_gradients<const P: usize>(
        self,
        _: Strip<'_>,
        _: f32,
        _: &mut [u32],
        _: [usize; 2],
    ) {
        match self {}
    }
}

impl Configured {
    pub(super) fn block<const P: usize>(
        &self,
        _: &[u32],
        _: &[u32],
        _: usize,
        _: Used,
        _: Write,
        _: (&mut MatrixMut<'_>, [usize; 2]),
    ) {
        match *self {}
    }

    pub(super) fn tall_block<const P: usize>(
        &self,
        _: Left<'_>,
        _: &Steps,
        _: &[u32],
        _: &mut TallSums,
    ) {
        match *self {}
    }
}
