use std::path::{Path, PathBuf};

/// What went wrong with data, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file system refused.
    #[error("cannot {action} {path}: {reason}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// An `index.json` that describes no dataset this program reads.
    #[error("{path}: {reason}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        reason: String,
    },
    /// A shard whose bytes are not what its index says.
    #[error(
        "damaged shard {shard}: {reason}; fetch it again, or allow damaged shards to be skipped"
    )]
    Damaged {
        /// The shard.
        shard: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A column that a sample lacks, or whose bytes are not of its encoding.
    #[error("column {column:?}: {reason}")]
    Column {
        /// The column.
        column: String,
        /// What is wrong with it, and what was expected.
        reason: String,
    },
    /// An encoding, hash or compression that is unknown.
    #[error("unknown {what} {name:?}; expected {expected}")]
    Unknown {
        /// Encoding, hash, compression, ...
        what: &'static str,
        /// The name found.
        name: String,
        /// The names known.
        expected: &'static str,
    },
    /// Counts from which no order of samples follows.
    #[error("no order of samples: {0}")]
    Order(String),
    /// An output folder that this job cannot go on with.
    #[error("{dir}: {reason}")]
    Job {
        /// The output folder.
        dir: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// A raw dataset that is not laid out as expected.
    #[error("{path}: {reason}")]
    Source {
        /// The file or folder.
        path: PathBuf,
        /// What was found and expected.
        reason: String,
    },
    /// The user asked to stop; what was done is kept.
    #[error("stopped; run the same command again to go on")]
    Stopped,
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, DataError>;

impl DataError {
    /// Wraps an input/output error.
    pub(crate) fn io(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(std::io::Error) -> DataError + use<> {
        let path = path.to_owned();
        move |error| DataError::Io {
            action,
            path,
            reason: error.to_string(),
        }
    }

    pub(crate) fn column(column: &str, reason: impl Into<String>) -> Self {
        DataError::Column {
            column: column.to_owned(),
            reason: reason.into(),
        }
    }
}
