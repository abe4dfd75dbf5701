//! Packed weights of large models on disk: a second start maps them instead of packing again.
//!
//! Packing is done for one instruction set and precision, and its result is of the size of the weights or
//! smaller; so there is one file for each part of a model, precision and set of weight files. It is only
//! worth it for large models: the miniature is packed in a few milliseconds.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nitro_models::PackedFile;
use nitro_ops::Precision;
use sha2::{Digest, Sha256};

use crate::PipelineError;
use crate::cache_folder::{self, Kind};
use crate::files::{ModelFile, hex};

/// Bytes of all files: the full-size model takes 3 GB in bf16, 2 GB in int8.
const DISK: u64 = 8 << 30;
/// The files of packed weights: `PART-PRECISION-HASH.safetensors`.
pub(crate) static KIND: Kind = Kind {
    holds: "packed weights",
    variable: "NITRO_PACKED_CACHE",
    name: "packed",
    limit: DISK,
    owns: |name| {
        let stem = name.strip_suffix(".safetensors");
        let hash = stem.and_then(|stem| stem.rsplit_once('-'));
        hash.is_some_and(|(_, hash)| cache_folder::is_hash(hash, HASH))
    },
};
/// Digits of the hash in a file's name.
const HASH: usize = 16;
/// Weight files smaller than this are packed in the time that it takes to look for a file.
const WORTH_A_FILE: u64 = 64 << 20;
/// What is read of a weight file to tell it from another: its beginning, which has a safetensors file's
/// header, and its end, which has a PyTorch file's directory.
const HEAD: u64 = 1 << 20;
const TAIL: u64 = 64 << 10;

/// Where packed weights are kept. Whatever goes wrong with the folder, weights are packed as if there
/// were none.
#[derive(Clone, Debug)]
pub struct PackedCache {
    folder: Option<PathBuf>,
    smallest: u64,
    limit: u64,
}

impl PackedCache {
    /// In `$NITRO_PACKED_CACHE`, else in `nitro/packed` of the user's cache folder; nowhere if the
    /// variable is empty or `off`.
    pub fn from_env() -> Self {
        Self {
            folder: KIND.folder(),
            ..Self::off()
        }
    }

    /// Nothing is kept.
    pub fn off() -> Self {
        Self {
            folder: None,
            smallest: WORTH_A_FILE,
            limit: DISK,
        }
    }

    /// In `folder`, at most `limit` bytes, for weight files of `smallest` bytes and more.
    pub fn in_folder(folder: impl Into<PathBuf>, smallest: u64, limit: u64) -> Self {
        Self {
            folder: Some(folder.into()),
            smallest,
            limit,
        }
    }

    /// What `make` makes of the weights in `files`, each with the scale at which it takes part; `part`
    /// names it among the parts that are made of the same files. `make` is given packed weights for its
    /// parameters.
    pub(crate) fn around<T>(
        &self,
        part: &str,
        precision: Precision,
        files: &[(&ModelFile, f64)],
        make: impl FnOnce(Option<&PackedFile>) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        let Some(file) = self.open(part, precision, files) else {
            return make(None);
        };
        let made = make(Some(&file))?;
        if file.was_enough() {
            cache_folder::touch(file.path());
        } else if file.bytes() as u64 <= self.limit {
            let _ = self.save(&file);
        }
        Ok(made)
    }

    fn open(
        &self,
        part: &str,
        precision: Precision,
        files: &[(&ModelFile, f64)],
    ) -> Option<PackedFile> {
        let folder = self.folder.as_ref()?;
        let mut key = format!("{part} {}", precision.name());
        let mut bytes = 0;
        for (file, scale) in files {
            // What is in the program is small.
            let ModelFile::Disk(path) = file else {
                return None;
            };
            bytes += describe(path, *scale, &mut key).ok()?;
        }
        if bytes < self.smallest {
            return None;
        }
        let hash = hex(&Sha256::digest(key.as_bytes())[..HASH / 2]);
        let name = format!("{part}-{}-{hash}.safetensors", precision.name());
        Some(PackedFile::open(folder.join(name), &key))
    }

    fn save(&self, file: &PackedFile) -> io::Result<()> {
        let folder = file.path().parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        file.save().map_err(io::Error::other)?;
        KIND.prune(folder, self.limit)
    }
}

/// Adds to `key` what tells a weight file from every other; its bytes.
fn describe(path: &Path, scale: f64, key: &mut String) -> io::Result<u64> {
    let real = fs::canonicalize(path)?;
    let mut file = File::open(&real)?;
    let metadata = file.metadata()?;
    let length = metadata.len();
    let modified = metadata.modified()?.duration_since(UNIX_EPOCH);
    let modified = modified.unwrap_or_default().as_nanos();
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let number = 0;
    let mut ends = Vec::new();
    (&file).take(HEAD).read_to_end(&mut ends)?;
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    file.take(TAIL).read_to_end(&mut ends)?;
    let hash = hex(&Sha256::digest(&ends)[..16]);
    // Writing to a string does not fail.
    let _ = write!(
        key,
        "; {} at {scale}: {length} bytes of {modified}, file {number}, ends {hash}",
        real.display()
    );
    Ok(length)
}

#[cfg(test)]
mod tests;
