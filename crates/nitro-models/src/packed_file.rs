//! Packed weights kept in a file, so that the next start maps them instead of packing again.
//!
//! The file is a safetensors file of bytes (`U8`): one tensor for each packed parameter, named after the
//! parameter and the form it was packed in. Every tensor is whole cache lines and begins on one, so
//! kernels read it where it lies: a start touches a few pages, and programs that run the same model
//! share its weights. Where the system has no huge pages for files, weights are copied to such pages.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nitro_files::write_whole_unsynced;
use nitro_kernels::mapped_file::MappedFile;
use nitro_ops::{PackedBytes, PackedForm};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::WeightError;
use crate::random::fnv1a64;

/// Says what the file is, in its metadata.
const FORMAT: &str = "nitro packed weights 1";
/// Where tensors may begin.
const ALIGN: usize = 64;
/// Of so many bytes one cache line goes into the checksum.
const SAMPLED: usize = 256 << 10;
/// Size of a huge page. A file that is written in such pieces, each at a multiple of its size, lies on
/// huge pages in the system's memory where the file system has them (ext4 and XFS on recent Linux).
const HUGE: usize = 2 << 20;
/// Weights on ordinary pages slow a model down by 10 to 30 %: mappings of this length and more that are
/// not on huge pages are copied.
const COPIED: usize = 64 << 20;

/// Packed weights by parameter and form: those of a file, and those that were packed because it did not
/// hold them.
///
/// A file belongs to a key, in which its owner says all that packed weights depend on besides their
/// form: which files they come from. A file that is not there, is damaged or belongs to another key is
/// as good as an empty one.
#[derive(Debug)]
pub struct PackedFile {
    path: PathBuf,
    key: String,
    found: HashMap<String, PackedBytes>,
    /// Whether weights are to be copied out of the mapping.
    copies: bool,
    asked: Mutex<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    entries: BTreeMap<String, PackedBytes>,
    /// Whether some were not found.
    packed: bool,
}

impl PackedFile {
    /// The file at `path`, if it is whole and belongs to `key`; else none of its weights.
    ///
    /// Of the contents a checksum covers the table and one cache line in 256 KiB, so that opening takes
    /// milliseconds. It notices a file that was cut, mixed up, or of which a power failure left holes;
    /// not a single flipped bit.
    pub fn open(path: impl Into<PathBuf>, key: &str) -> Self {
        let path = path.into();
        let (found, copies) = read(&path, key).unwrap_or_default();
        Self {
            path,
            key: key.to_owned(),
            found,
            copies,
            asked: Mutex::default(),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether everything that was asked for came from the file.
    pub fn was_enough(&self) -> bool {
        !self.asked().packed
    }

    /// Bytes of packed weights that were asked for.
    pub fn bytes(&self) -> usize {
        let asked = self.asked();
        asked.entries.values().map(|b| b.as_bytes().len()).sum()
    }

    /// Writes what was asked for, if the file did not hold all of it. The folder must exist.
    ///
    /// # Errors
    /// What the file system says; the file is then as it was.
    pub fn save(&self) -> Result<(), WeightError> {
        let asked = self.asked();
        if !asked.packed {
            return Ok(());
        }
        write(&self.path, &self.key, &asked.entries).map_err(|source| WeightError::Io {
            path: self.path.clone(),
            source,
        })
    }

    pub(crate) fn get(&self, name: &str, form: &PackedForm) -> Option<PackedBytes> {
        let entry = entry_name(name, form);
        let bytes = self.found.get(&entry)?;
        if bytes.as_bytes().len() != form.len {
            return None;
        }
        self.asked().entries.insert(entry, bytes.clone());
        Some(match self.copies {
            true => bytes.copied(),
            false => bytes.clone(),
        })
    }

    pub(crate) fn put(&self, name: &str, form: &PackedForm, bytes: &PackedBytes) {
        let mut asked = self.asked();
        asked.packed = true;
        asked.entries.insert(entry_name(name, form), bytes.clone());
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry_name(name: &str, form: &PackedForm) -> String {
    format!("{name}: {}", form.name)
}

/// One number over the names, and some bytes of every tensor.
fn checksum<'a>(entries: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut sampled = Vec::new();
    for (name, bytes) in entries {
        sampled.extend_from_slice(name.as_bytes());
        sampled.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        for part in bytes.chunks(SAMPLED) {
            sampled.extend_from_slice(&part[..part.len().min(ALIGN)]);
        }
        // A file that was cut or not written to its end.
        sampled.extend_from_slice(&bytes[bytes.len().saturating_sub(ALIGN)..]);
    }
    format!("{:016x}", fnv1a64(&sampled))
}

/// The tensors of a whole file, and whether they should be copied.
fn read(path: &Path, key: &str) -> Option<(HashMap<String, PackedBytes>, bool)> {
    let file = Arc::new(MappedFile::open(path).ok()?);
    let (header, metadata) = SafeTensors::read_metadata(file.as_bytes()).ok()?;
    let stated = metadata.metadata().as_ref()?;
    let says = |name: &str, value: &str| stated.get(name).is_some_and(|found| found == value);
    if !says("format", FORMAT) || !says("key", key) {
        return None;
    }
    file.prefer_huge_pages();
    let data = header + 8; // after the header's length and the header
    let mut found = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let bytes = PackedBytes::of_file(&file, data + start..data + end)?;
        found.insert(name, bytes);
    }
    if !says("checksum", &checksum(entries(&found))) {
        return None;
    }
    // The checksum has touched every part.
    let copies = file.as_bytes().len() >= COPIED && file.is_on_huge_pages() == Some(false);
    Some((found.into_iter().collect(), copies))
}

fn entries(entries: &BTreeMap<String, PackedBytes>) -> impl Iterator<Item = (&str, &[u8])> {
    let entries = entries.iter();
    entries.map(|(name, bytes)| (name.as_str(), bytes.as_bytes()))
}

fn write(path: &Path, key: &str, packed: &BTreeMap<String, PackedBytes>) -> io::Result<()> {
    let mut header = Map::new();
    let metadata = json!({ "format": FORMAT, "key": key, "checksum": checksum(entries(packed)) });
    header.insert("__metadata__".to_owned(), metadata);
    let mut offset = 0;
    for (name, bytes) in entries(packed) {
        let end = offset + bytes.len();
        let entry = json!({ "dtype": "U8", "shape": [bytes.len()], "data_offsets": [offset, end] });
        header.insert(name.to_owned(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data begin on a cache line.
    header.resize((header.len() + 8).next_multiple_of(ALIGN) - 8, b' ');

    write_whole_unsynced(path, |out| {
        let mut buffer = Vec::with_capacity(HUGE);
        let length = (header.len() as u64).to_le_bytes();
        let parts = [&length[..], &header].into_iter();
        for mut part in parts.chain(entries(packed).map(|(_, bytes)| bytes)) {
            while !part.is_empty() {
                let (now, later) = part.split_at(part.len().min(HUGE - buffer.len()));
                buffer.extend_from_slice(now);
                part = later;
                if buffer.len() == HUGE {
                    out.write_all(&buffer)?;
                    buffer.clear();
                }
            }
        }
        out.write_all(&buffer)
    })
}

#[cfg(test)]
mod tests;
