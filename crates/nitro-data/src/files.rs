//! Files with this crate's errors.

use std::fs;
use std::path::Path;

use crate::{DataError, Result};

/// Writes `bytes` as a file that appears whole or not at all. Missing folders are made.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(DataError::io("make folder", parent))?;
    }
    nitro_files::write_bytes(path, bytes).map_err(DataError::io("write", path))
}

/// Reads a whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(DataError::io("read", path))
}
