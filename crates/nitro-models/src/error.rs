//! What can be wrong with weights.

use std::path::PathBuf;

/// A parameter could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// A weight file could not be opened or read.
    #[error("cannot read weights {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A weight file is not a whole safetensors file.
    #[error("{path} is not a complete safetensors file ({reason}); download or copy it again")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint is not as `torch.save` writes it.
    #[error("{path} cannot be read as a PyTorch checkpoint: {reason}")]
    CorruptTorch {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor is not there.
    #[error(
        "{origin} has no tensor `{name}` (expected shape {expected:?}); is it the right model?"
    )]
    Missing {
        /// File, folder or other source.
        origin: String,
        /// Official tensor name.
        name: String,
        /// The shape the model needs.
        expected: Vec<usize>,
    },
    /// A tensor has another shape.
    #[error("{origin}: tensor `{name}` has shape {found:?}, the model expects {expected:?}")]
    Shape {
        /// File, folder or other source.
        origin: String,
        /// Official tensor name.
        name: String,
        /// The shape the model needs.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor has a type that is not a float we read.
    #[error("{origin}: tensor `{name}` has dtype {found}; f32, f16 and bf16 are read")]
    Dtype {
        /// File, folder or other source.
        origin: String,
        /// Official tensor name.
        name: String,
        /// The dtype found.
        found: String,
    },
    /// A source holds tensors that the model has no place for.
    #[error(
        "{origin} holds tensors the model has no place for: {}",
        first_few(names)
    )]
    Unexpected {
        /// File, folder or other source.
        origin: String,
        /// Official tensor names.
        names: Vec<String>,
    },
    /// A configuration does not describe a model that can be built.
    #[error("{origin}: {reason}")]
    Config {
        /// File or folder.
        origin: String,
        /// What is wrong and what was expected.
        reason: String,
    },
}

/// A model was given inputs that do not suit it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{model}: {reason}")]
pub struct InputError {
    /// The model.
    pub model: &'static str,
    /// What was wrong and what was expected.
    pub reason: String,
}

/// The first names of a list that may be long.
fn first_few(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
