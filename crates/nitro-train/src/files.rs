//! Files that appear whole or not at all.

use std::io::Read;
use std::path::Path;

use nitro_pipeline::ModelFile;

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

/// The checksum of a model's file.
pub(crate) fn checksum(file: &ModelFile) -> Result<u32, TrainError> {
    match file {
        ModelFile::Disk(path) => checksum_of(path),
        ModelFile::Embedded { bytes, .. } => Ok(crc32c::crc32c(bytes)),
    }
}

/// The checksum of a file, which may be larger than memory.
pub(crate) fn checksum_of(path: &Path) -> Result<u32, TrainError> {
    let io = |source| TrainError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let (mut sum, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => return Ok(sum),
            read => sum = crc32c::crc32c_append(sum, &buffer[..read]),
        }
    }
}

/// Fails, and leaves no trace, if nothing can be written in the folder `dir`, which need not be there
/// yet: better at a run's start than at its end.
pub(crate) fn check_writable(dir: &Path) -> Result<(), TrainError> {
    // The nearest folder above that is there; of a relative path, at last the present one.
    let mut place = dir;
    while !place.as_os_str().is_empty() && !place.exists() {
        place = place.parent().unwrap_or(Path::new(""));
    }
    let place = match place.as_os_str().is_empty() {
        true => Path::new("."),
        false => place,
    };
    let tried = tempfile::tempfile_in(place).map(drop);
    tried.map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })
}
