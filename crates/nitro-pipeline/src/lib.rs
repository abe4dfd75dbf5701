//! Prompt to picture: model folders and the Hub, caption cleaning, tokenisation, the pipeline,
//! pictures with metadata.
//!
//! The data's way: [`files`] finds a model by its [`card`] (through [`hub`] where it must), `load`
//! turns it into a [`Pipeline`]; a [`Request`]'s prompts go through [`caption`] and [`tokenizer`]
//! into the text encoder, the sampler turns noise into latents, the decoder latents into pictures,
//! and [`picture`] writes them.

mod cache_folder;
pub mod caption;
pub mod card;
mod encoders;
mod error;
pub mod files;
mod generate;
pub mod hub;
mod info;
mod load;
mod packed_cache;
mod part;
pub mod picture;
mod pipeline;
mod pixels;
mod prompt_cache;
mod request;
mod sample;
mod text;
pub mod tokenizer;

pub use cache_folder::{CacheFolder, caches};
pub use card::{ModelCard, Variant};
pub use encoders::{EncoderParts, Encoders};
pub use error::{PipelineError, RequestError};
pub use files::{EmbeddedModel, ModelFile, ModelFiles, ModelLocation, OFFICIAL_REPOSITORY};
pub use generate::{Event, StepEvent};
pub use hub::{DownloadProgress, Hub, HubError, HubOptions};
pub use info::{ModelInfo, PartInfo, VariantInfo};
pub use load::{CONFIG_KEY, PipelineBuilder};
pub use packed_cache::PackedCache;
pub use pipeline::Pipeline;
pub use pixels::to_pictures;
pub use prompt_cache::PromptCache;
pub use request::{
    CudaDevice, Generated, InitImage, NoiseKind, Output, Request, Seeds, Stage, Timings, Truncation,
};
pub use sample::{Plan, Prepared, Sample};
pub use text::{EncodedText, TextFeatures};
