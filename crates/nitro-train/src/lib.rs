//! Training: the autoencoder, the text encoder, REPA's teacher and the E-MMDiT, with checkpoints that resume exactly.
//!
//! A run is a [`config::RunConfig`]; [`trainer::train`] takes a [`trainer::Task`] (model, data,
//! loss) through it. Weights are kept in `f32`; matrix products are computed in the precision of the
//! configuration. The model is rebuilt around the step's tensors each time, so one definition of each
//! model serves training and inference.

pub mod ablations;
mod adapter;
pub mod autoencoder;
pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod configs;
mod data;
mod data_config;
pub mod distill;
pub mod emmdit;
mod error;
pub mod export;
mod files;
mod frozen;
pub mod grpo;
pub mod language_model;
pub mod latents;
pub mod lora;
pub mod losses;
pub mod miniature;
pub mod null_text;
pub mod optimizer;
mod pictures;
pub mod plan;
pub mod preference;
mod progress;
pub mod prompts;
mod recompute;
mod repa;
pub mod rewards;
mod start;
pub mod store;
pub mod tensorboard;
pub mod tokenizer;
pub mod trainer;
pub mod visual_encoder;

pub use error::TrainError;
/// Runs a training on a thread of the pool, which spares each kernel the hand-over to it.
pub use nitro_kernels::pool::install as in_pool;
