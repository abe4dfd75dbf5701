use std::path::{Path, PathBuf};

use thiserror::Error;

/// What can go wrong while scoring.
#[derive(Debug, Error)]
pub enum EvalError {
    /// A file or folder could not be read or written.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// "read", "write", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{path}: expected {expected}: {source}")]
    Json {
        /// What the file should hold.
        expected: &'static str,
        /// The file, with a line number where it has several records.
        path: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// A picture could not be decoded or encoded.
    #[error("{path}: cannot {action} this picture: {source}")]
    Picture {
        /// "read" or "write".
        action: &'static str,
        /// The picture.
        path: PathBuf,
        /// The cause.
        source: image::ImageError,
    },
    /// Pixels and dimensions disagree.
    #[error("{what}: {width}x{height} RGB needs {expected} bytes, got {actual}")]
    PixelCount {
        /// The picture or the operation.
        what: String,
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// `width * height * 3`.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// A position clause refers to a clause that does not come before it.
    #[error(
        "prompt \"{prompt}\": the position of \"{class}\" refers to include clause {target}, but \
         only {earlier} clauses come before it; name an earlier one, counted from 0"
    )]
    PositionTarget {
        /// The prompt.
        prompt: String,
        /// Class of the clause that refers.
        class: String,
        /// The clause referred to.
        target: usize,
        /// How many clauses come before.
        earlier: usize,
    },
    /// The folder holds no prompt folders.
    #[error(
        "{path}: no prompt folders here; expected 00000/metadata.jsonl with 00000/samples/0000.png \
         and so on"
    )]
    NoPrompts {
        /// The folder.
        path: PathBuf,
    },
    /// A folder belongs to a run with other settings.
    #[error(
        "{path} belongs to another run: it says {found}, and this run is {wanted}; choose another \
         folder, or delete this one to start again"
    )]
    OtherRun {
        /// The manifest.
        path: PathBuf,
        /// Settings found, as JSON.
        found: String,
        /// Settings of this run, as JSON.
        wanted: String,
    },
    /// A tokenizer failed.
    #[error("the tokenizer failed: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// A scorer's files are not there.
    #[error(
        "{place} holds no scorer: none of {names} is there (give a weight file, a folder that has it, \
         or org/name on the Hub)"
    )]
    NoScorer {
        /// Folder or name that was given.
        place: String,
        /// File names that were looked for.
        names: String,
    },
    /// A folder of prompts has none of a benchmark's files.
    #[error("{path}: none of {names} is here")]
    NoPromptFiles {
        /// The folder.
        path: PathBuf,
        /// The files that were looked for.
        names: String,
    },
    /// A scorer refused what it was given.
    #[error("the scorer refused its input: {reason}")]
    Scorer {
        /// What it said.
        reason: String,
    },
    /// A scorer's weights or configuration could not be used.
    #[error(transparent)]
    Weights(#[from] nitro_models::WeightError),
    /// A scorer's files could not be had.
    #[error(transparent)]
    Files(#[from] nitro_pipeline::PipelineError),
    /// The judge refused the picture.
    #[error("{what}: {source}")]
    Judge {
        /// The picture.
        what: String,
        /// The cause.
        source: nitro_data::shapes::ShapesError,
    },
}

impl EvalError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| EvalError::Io {
            action,
            path,
            source,
        }
    }
}

/// Writes a file so that a reader sees the old one or the whole new one, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), EvalError> {
    nitro_files::write_bytes(path, bytes).map_err(EvalError::io("write", path))
}
