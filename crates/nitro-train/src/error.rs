//! What can go wrong in training.

use std::path::PathBuf;

/// A run could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration is wrong.
    #[error("{origin}: {reason}")]
    Config {
        /// Where it was read.
        origin: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Weights could not be read or written.
    #[error(transparent)]
    Weights(#[from] nitro_models::WeightError),
    /// Gradients do not fit the parameters.
    #[error(transparent)]
    Kernel(#[from] nitro_kernels::error::KernelError),
    /// A model was given inputs that do not fit it.
    #[error(transparent)]
    Input(#[from] nitro_models::InputError),
    /// A schedule or sampler was asked for something it cannot do.
    #[error(transparent)]
    Diffusion(#[from] nitro_diffusion::Error),
    /// A checkpoint does not fit the run that would resume from it.
    #[error("{path} cannot be resumed: {reason}")]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// What differs and what to do.
        reason: String,
    },
    /// Too many steps in a row had a gradient that is not finite.
    #[error(
        "{steps} steps in a row had a gradient that is not finite (last at step {step}); lower the learning rate"
    )]
    NotFinite {
        /// How many.
        steps: u64,
        /// The last one.
        step: u64,
    },
    /// The tokenizer could not be trained or read.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A picture could not be written.
    #[error("cannot write {path}: {reason}")]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The user asked to stop; a checkpoint was written.
    #[error("stopped at step {step}; run the same command again to go on")]
    Interrupted {
        /// Steps done.
        step: u64,
    },
}
