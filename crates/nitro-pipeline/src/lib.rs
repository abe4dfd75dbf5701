//! Prompt to picture: model folders and the Hub, tokenisation, the pipeline.

pub mod card;
mod error;
pub mod files;
pub mod hub;
pub mod tokenizer;

pub use card::{ModelCard, Variant};
pub use error::{PipelineError, RequestError};
pub use files::{EmbeddedModel, ModelFile, ModelFiles, ModelLocation, OFFICIAL_REPOSITORY};
pub use hub::{DownloadProgress, Hub, HubError, HubOptions};
