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
    /// A model could not be loaded or used.
    #[error(transparent)]
    Pipeline(#[from] nitro_pipeline::PipelineError),
    /// Prompts could not be read, or pictures not judged.
    #[error(transparent)]
    Eval(#[from] nitro_eval::EvalError),
    /// A reward could not be had.
    #[error("reward `{scorer}`: {reason}")]
    Reward {
        /// The scorer's name in the configuration.
        scorer: String,
        /// What happened and what to do.
        reason: String,
    },
    /// Shards could not be read, or no order follows from the numbers given.
    #[error(transparent)]
    Dataset(#[from] nitro_data::DataError),
    /// The policy is being lost; the last checkpoint is the one before.
    #[error("stopped at step {step}, the policy is collapsing: {reason}")]
    Collapsed {
        /// Rollouts done.
        step: u64,
        /// What was seen and what to change.
        reason: String,
    },
    /// Training data are not as they should be.
    #[error("{path}: {reason}")]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A checkpoint does not fit the run that would resume from it.
    #[error("{path} cannot be resumed: {reason}")]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// What differs and what to do.
        reason: String,
    },
    /// The disk is full.
    #[error(
        "{path}: the disk is full, and a checkpoint of this run takes {megabytes} MB; what was \
         written before is whole: free some space and run the same command again"
    )]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// What it takes.
        megabytes: u64,
    },
    /// The thread that makes batches ended.
    #[error("the thread that makes batches ended before the run; its message is above")]
    DataThread,
    /// The processes of the run cannot go on together.
    #[error(transparent)]
    Comm(#[from] nitro_comm::CommError),
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
