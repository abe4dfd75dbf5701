//! What can go wrong between a prompt and a picture.

use std::path::PathBuf;

use crate::hub::HubError;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// The request asks for something that cannot be done; nothing was computed.
    #[error("{0}")]
    Request(#[from] RequestError),
    /// No model lives at the given place.
    #[error("no model at {place}: {reason}")]
    NoModel {
        /// Folder or name that was given.
        place: String,
        /// What was looked for.
        reason: String,
    },
    /// A model has no variant of this name.
    #[error("{model} has no variant `{wanted}`; it has {known}")]
    UnknownVariant {
        /// Name of the model.
        model: String,
        /// Variant asked for.
        wanted: String,
        /// Variants there are.
        known: String,
    },
    /// A file of a model could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration or tokenizer file does not say what it should.
    #[error("{file}: {reason}")]
    BadFile {
        /// The file.
        file: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// The Hugging Face Hub did not give a file.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Weights are missing, damaged or of another model.
    #[error(transparent)]
    Weights(#[from] nitro_models::WeightError),
    /// Parts of a model do not fit each other.
    #[error("the parts of the model do not fit each other: {reason}")]
    Mismatch {
        /// Which parts, what was found and what was expected.
        reason: String,
    },
    /// A model computed infinities or no numbers at all.
    #[error(
        "{file} gave values that are not finite: its weights are damaged; download or copy it again"
    )]
    NotFinite {
        /// The weights of the part whose output was wrong.
        file: String,
    },
    /// The sampler refused its settings.
    #[error(transparent)]
    Sampling(#[from] nitro_diffusion::Error),
    /// The caller asked to stop.
    #[error("stopped on request after {done} of {total} steps")]
    Cancelled {
        /// Steps finished.
        done: usize,
        /// Steps planned.
        total: usize,
    },
}

impl PipelineError {
    /// Whether the caller asked for something impossible, in contrast to a model, disk or network
    /// that failed. Command lines map this to exit code 2, servers to status 400.
    pub fn is_bad_request(&self) -> bool {
        matches!(self, Self::Request(_) | Self::UnknownVariant { .. })
            || matches!(self, Self::Sampling(_))
    }
}

/// A request that cannot be carried out as it stands.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// No prompt at all.
    #[error("no prompt was given")]
    NoPrompt,
    /// A prompt without content.
    #[error("prompt {number} is empty{cleaned}; say what the picture shows")]
    EmptyPrompt {
        /// Position, from 1.
        number: usize,
        /// Remark for a prompt that only caption cleaning emptied.
        cleaned: &'static str,
    },
    /// The number of negative prompts fits neither one nor all prompts.
    #[error("{given} negative prompts for {prompts} prompts; give none, one, or one per prompt")]
    NegativePrompts {
        /// Negative prompts given.
        given: usize,
        /// Prompts given.
        prompts: usize,
    },
    /// Width and height differ, or do not divide.
    #[error("size {width}x{height}: {reason}")]
    Size {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
        /// What this model needs.
        reason: String,
    },
    /// A setting is outside its range.
    #[error("{name} {value}: {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// The value given.
        value: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// The mask does not cover the initial image.
    #[error(
        "the mask is {mask_width}x{mask_height} but the initial image is {width}x{height}; \
         both must have the same size"
    )]
    MaskSize {
        /// Pixels of the mask.
        mask_width: usize,
        /// Pixels of the mask.
        mask_height: usize,
        /// Pixels of the image.
        width: usize,
        /// Pixels of the image.
        height: usize,
    },
    /// A mask without an image to keep the rest of.
    #[error("a mask needs an initial image: it says which part of that image is painted anew")]
    MaskWithoutImage,
    /// Noise given by the caller has another shape.
    #[error("latents have {found} values; {images} pictures of this size need {expected}")]
    Latents {
        /// Values given.
        found: usize,
        /// Values needed.
        expected: usize,
        /// Pictures of the request.
        images: usize,
    },
    /// The list of seeds does not fit the pictures.
    #[error("{found} seeds for {images} pictures; give one per picture")]
    Seeds {
        /// Seeds given.
        found: usize,
        /// Pictures of the request.
        images: usize,
    },
}
