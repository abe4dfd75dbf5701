//! The models of Nitro-E, each with its official state-dict names and shapes.

mod error;
pub mod layers;
mod params;

pub use error::WeightError;
pub use params::{Init, ParameterSource, ParameterSpec, Params};
