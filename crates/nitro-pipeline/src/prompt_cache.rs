//! Text features that were computed before, in memory and on disk: the one cache of the command line,
//! the library and the server, shared by all variants of a loaded model.
//!
//! A text encoder is a billion parameters, and half of all guided pictures ask it for the features of
//! the empty prompt. Features depend on the tokens, on the encoder's weights and on how products are
//! computed, and on nothing else; so they are kept under a hash of these. The folder holds no texts,
//! only hashes and features.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use nitro_files::write_bytes;
use nitro_kernels::isa::{Isa, Precision};
use sha2::{Digest, Sha256};

use crate::cache_folder::{self, Kind};
use crate::files::{ModelFile, hex};
use crate::tokenizer::Tokens;

/// Bytes of features kept in memory unless a builder says otherwise: about 60 prompts of the full-size
/// model.
pub(crate) const MEMORY: usize = 64 << 20;
/// Bytes of features kept on disk: a few hundred prompts of the full-size model.
const DISK: u64 = 256 << 20;
/// Encoders of smaller files are computed faster than a file is read.
const WORTH_A_FILE: u64 = 64 << 20;
/// The files of features, named by a SHA-256.
pub(crate) static KIND: Kind = Kind {
    holds: "text features",
    variable: "NITRO_PROMPT_CACHE",
    name: "prompts",
    limit: DISK,
    owns: |name| cache_folder::is_hash(name, 2 * DIGEST),
};
const MAGIC: &[u8; 8] = b"nitrotx1";
const DIGEST: usize = 32;

type Key = [u8; DIGEST];

/// Features by what they were computed from. Whatever goes wrong with the folder, features are
/// computed as if there were none.
#[derive(Debug)]
pub struct PromptCache {
    /// Identifies encoder and arithmetic.
    encoder: Key,
    folder: Option<PathBuf>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    features: HashMap<Key, (Arc<[f32]>, u64)>,
    /// Most bytes of features, and how many there are.
    limit: usize,
    bytes: usize,
    clock: u64,
    hits: u64,
    misses: u64,
}

impl PromptCache {
    /// For the encoder whose weights are `weights`; at most `limit` bytes of features stay in memory.
    pub(crate) fn new(weights: &ModelFile, precision: Precision, limit: usize) -> Self {
        let folder = match weights {
            ModelFile::Disk(path) if size(path) >= WORTH_A_FILE => KIND.folder(),
            _ => None,
        };
        Self::in_folder(weights, precision, limit, folder)
    }

    fn in_folder(
        weights: &ModelFile,
        precision: Precision,
        limit: usize,
        folder: Option<PathBuf>,
    ) -> Self {
        let mut sha256 = Sha256::new();
        sha256.update(MAGIC);
        sha256.update(format!("{precision:?} {} ", Isa::current().name()));
        match weights {
            ModelFile::Disk(path) => {
                let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                sha256.update(real.as_os_str().as_encoded_bytes());
                let stamp = fs::metadata(&real).and_then(|m| Ok((m.len(), m.modified()?)));
                if let Ok((length, modified)) = stamp {
                    let age = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
                    sha256.update(length.to_le_bytes());
                    sha256.update(age.as_nanos().to_le_bytes());
                }
            }
            ModelFile::Embedded { bytes, .. } => sha256.update(bytes),
        }
        Self {
            encoder: sha256.finalize().into(),
            folder,
            memory: Mutex::new(Memory::new(limit)),
        }
    }

    /// How often the features of a text were known, in memory or on disk.
    pub fn hits(&self) -> u64 {
        self.memory().hits
    }

    /// How often they had to be computed.
    pub fn misses(&self) -> u64 {
        self.memory().misses
    }

    /// Bytes of features in memory.
    pub fn bytes(&self) -> usize {
        self.memory().bytes
    }

    /// Whether features are kept on disk as well.
    pub(crate) fn is_on_disk(&self) -> bool {
        self.folder.is_some()
    }

    /// Under what the features of `tokens` are kept.
    fn key(&self, tokens: &Tokens) -> Key {
        let mut sha256 = Sha256::new();
        sha256.update(self.encoder);
        for (id, seen) in tokens.ids.iter().zip(tokens.mask()) {
            sha256.update(id.to_le_bytes());
            sha256.update([u8::from(seen)]);
        }
        sha256.finalize().into()
    }

    /// The features of `tokens`, if they are known.
    pub(crate) fn get(&self, tokens: &Tokens) -> Option<Arc<[f32]>> {
        let key = self.key(tokens);
        let known = self.memory().get(&key);
        let known = known.or_else(|| {
            let path = self.path(&key)?;
            let features: Arc<[f32]> = read(&path)?.into();
            // The oldest files go first: this one is young again.
            cache_folder::touch(&path);
            self.memory().insert(key, features.clone());
            Some(features)
        });
        let mut memory = self.memory();
        match known {
            Some(_) => memory.hits += 1,
            None => memory.misses += 1,
        }
        known
    }

    /// Keeps the features of `tokens`.
    pub(crate) fn insert(&self, tokens: &Tokens, features: Arc<[f32]>) {
        let key = self.key(tokens);
        if let Some(path) = self.path(&key) {
            let _ = write(&path, &features);
        }
        self.memory().insert(key, features);
    }

    fn path(&self, key: &Key) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(hex(key)))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    fn get(&mut self, key: &Key) -> Option<Arc<[f32]>> {
        self.clock += 1;
        let (features, used) = self.features.get_mut(key)?;
        *used = self.clock;
        Some(features.clone())
    }

    fn insert(&mut self, key: Key, features: Arc<[f32]>) {
        if size_of_val(&*features) > self.limit {
            return;
        }
        self.clock += 1;
        self.bytes += size_of_val(&*features);
        if let Some((old, _)) = self.features.insert(key, (features, self.clock)) {
            self.bytes -= size_of_val(&*old);
        }
        while self.bytes > self.limit {
            let oldest = self.features.iter().min_by_key(|(_, (_, used))| *used);
            let Some(oldest) = oldest.map(|(key, _)| *key) else {
                return;
            };
            if let Some((old, _)) = self.features.remove(&oldest) {
                self.bytes -= size_of_val(&*old);
            }
        }
    }
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Magic, digest of the rest, elements.
fn write(path: &Path, features: &[f32]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let data: Vec<u8> = features.iter().flat_map(|x| x.to_le_bytes()).collect();
    let digest: Key = Sha256::digest(&data).into();
    write_bytes(path, &[&MAGIC[..], &digest, &data].concat())?;
    KIND.prune(folder, DISK)
}

/// The features of a file, if it is whole.
fn read(path: &Path) -> Option<Vec<f32>> {
    let bytes = fs::read(path).ok()?;
    let (digest, data) = bytes.strip_prefix(MAGIC)?.split_at_checked(DIGEST)?;
    let (elements, rest) = data.as_chunks::<4>();
    let whole = rest.is_empty() && Sha256::digest(data)[..] == *digest;
    whole.then(|| elements.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Tokens {
        Tokens {
            ids: ids.to_vec(),
            length: ids.len(),
            cut: None,
        }
    }

    fn weights(folder: &Path, content: &[u8]) -> ModelFile {
        let path = folder.join("model.safetensors");
        fs::write(&path, content).unwrap();
        ModelFile::Disk(path)
    }

    #[test]
    fn features_are_found_again_in_memory_and_by_another_process() {
        let place = tempfile::tempdir().unwrap();
        let file = weights(place.path(), b"weights");
        let folder = Some(place.path().join("cache"));
        let cache = PromptCache::in_folder(&file, Precision::Bf16, MEMORY, folder.clone());
        let (ids, features) = (tokens(&[1, 2, 3]), vec![0.5, -1.0, f32::MIN_POSITIVE]);
        assert!(cache.get(&ids).is_none());
        cache.insert(&ids, features.clone().into());
        assert_eq!(*cache.get(&ids).unwrap(), features[..]);
        assert_eq!((cache.hits(), cache.misses(), cache.bytes()), (1, 1, 12));
        let next = PromptCache::in_folder(&file, Precision::Bf16, MEMORY, folder.clone());
        assert_eq!(*next.get(&ids).unwrap(), features[..]);
        assert!(next.get(&tokens(&[1, 2, 4])).is_none());

        // Another arithmetic or other weights give other features.
        let other = PromptCache::in_folder(&file, Precision::F32, MEMORY, folder.clone());
        assert!(other.get(&ids).is_none());
        let file = weights(place.path(), b"other weights");
        let other = PromptCache::in_folder(&file, Precision::Bf16, MEMORY, folder);
        assert!(other.get(&ids).is_none());
    }

    #[test]
    fn damaged_files_and_unusable_folders_are_as_good_as_none() {
        let place = tempfile::tempdir().unwrap();
        let file = weights(place.path(), b"weights");
        let folder = place.path().join("cache");
        let ids = tokens(&[7]);
        let cache = || PromptCache::in_folder(&file, Precision::F32, MEMORY, Some(folder.clone()));
        cache().insert(&ids, vec![1.0; 8].into());
        let path = fs::read_dir(&folder)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[50] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(cache().get(&ids).is_none());
        fs::write(&path, &bytes[..20]).unwrap();
        assert!(cache().get(&ids).is_none());

        let below = Some(path.join("below a file"));
        let blocked = PromptCache::in_folder(&file, Precision::F32, MEMORY, below);
        blocked.insert(&ids, vec![2.0].into());
        assert_eq!(*blocked.get(&ids).unwrap(), [2.0]);
    }

    #[test]
    fn memory_is_bounded_and_forgets_what_was_not_used_for_longest() {
        let key = |n: u8| [n; DIGEST];
        let features = |count: usize| -> Arc<[f32]> { vec![0.0; count].into() };
        let mut memory = Memory::new(800);
        memory.insert(key(1), features(100));
        memory.insert(key(2), features(100));
        assert!(memory.get(&key(1)).is_some());
        memory.insert(key(3), features(100));
        assert!(memory.get(&key(2)).is_none());
        assert!(memory.get(&key(1)).is_some() && memory.get(&key(3)).is_some());
        memory.insert(key(3), features(50));
        assert_eq!(memory.bytes, 600);
        // What does not fit at all is not kept; nothing is where nothing may be.
        memory.insert(key(4), features(201));
        assert!(memory.get(&key(4)).is_none() && memory.get(&key(1)).is_some());
        let mut none = Memory::new(0);
        none.insert(key(1), features(1));
        assert!(none.get(&key(1)).is_none());
    }
}
