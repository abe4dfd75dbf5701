//! The models of Nitro-E, each with its official state-dict names and shapes.

pub mod blip;
pub mod clip;
pub mod dcae;
pub mod dinov2;
pub mod emmdit;
mod error;
mod formula;
pub mod layers;
pub mod llama;
mod lora;
pub mod mask2former;
mod packed_file;
mod params;
mod random;
pub mod swin;
mod table;
mod tensor_map;
mod torch_file;
mod weights;

pub use error::{InputError, WeightError};
pub use formula::FormulaWeights;
pub use lora::{
    Adapted, LiveAdapter, LoraAdapter, LoraLayer, LoraSpec, Merged, save_comfy, save_peft,
};
pub use packed_file::PackedFile;
pub use params::{Elements, Init, LowRank, ParameterSource, ParameterSpec, Params};
pub use random::RandomInit;
pub use table::StoredTable;
pub use tensor_map::TensorMap;
pub use weights::{DType, WeightFiles, save_safetensors};
