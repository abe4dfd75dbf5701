//! Files that appear whole or not at all.

use std::path::Path;

use crate::TrainError;

/// Writes `bytes` whole or not at all; makes missing folders.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let io = |source| TrainError::Io {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    nitro_files::write_bytes(path, bytes).map_err(io)
}

/// Writes `value` as indented JSON.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), TrainError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| TrainError::Config {
        origin: path.display().to_string(),
        reason: e.to_string(),
    })?;
    write_whole(path, text.as_bytes())
}
