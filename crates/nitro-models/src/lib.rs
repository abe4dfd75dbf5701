//! The models of Nitro-E, each with its official state-dict names and shapes.

pub mod dcae;
pub mod dinov2;
pub mod emmdit;
mod error;
mod formula;
pub mod layers;
pub mod llama;
mod lora;
mod params;
mod random;
mod tensor_map;
mod weights;

pub use error::{InputError, WeightError};
pub use formula::FormulaWeights;
pub use lora::{
    Adapted, LiveAdapter, LoraAdapter, LoraLayer, LoraSpec, Merged, save_comfy, save_peft,
};
pub use params::{Elements, Init, LowRank, ParameterSource, ParameterSpec, Params};
pub use random::RandomInit;
pub use tensor_map::TensorMap;
pub use weights::{DType, StoredTable, WeightFiles, save_safetensors};
