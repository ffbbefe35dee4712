//! Files and folders that survive every moment of a kill.
//!
//! | what | promise |
//! | --- | --- |
//! | [`write_over`], [`write_new`], [`NewFolder`] | a file or folder is there complete, as it was before, or not at all |
//! | [`write_new`], [`write_numbered`], [`disk::rename_new`] | what somebody else put there is not written over, at whatever moment |
//! | [`Claim`] | a name belongs to one living process; who died has left it |
//! | [`Generations`] | the last state that was written whole is found, whatever happened to the one after it |
//! | [`Pace`] | so little time is lost by a kill, and so little spent on writing |
//! | [`disk`] | every change of a file or folder goes through it, so that a test can make each fail or be the last one |
//!
//! Host and plugin write with the same functions, so that one test tries both.

mod claim;
pub mod disk;
mod fault;
mod generations;
mod pace;
mod whole;

pub use claim::{Claim, ClaimError};
pub use generations::{Generations, Torn};
pub use pace::Pace;
pub use whole::{
    NewFolder, is_below, is_torn, numbered, remove_torn, rename_numbered, write_new,
    write_numbered, write_over, write_shown,
};
