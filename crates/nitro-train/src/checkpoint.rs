//! Checkpoints: whole or absent, the newest few kept, everything a run needs to go on.
//!
//! A checkpoint is one safetensors file `checkpoints/step-00001000.safetensors` holding, for every
//! parameter, `weight/NAME`, `first/NAME`, `second/NAME` and `ema/NAME` in `f32`, and in its metadata
//! the step, the resolved configuration and what the data was. Data, noise and dropout are functions of (seed, step), so
//! no generator state is stored.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nitro_models::{DType, WeightError, WeightFiles, save_safetensors};

use crate::TrainError;
use crate::store::{Entry, ParameterStore};

/// Where a run stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Updates applied (steps less those skipped).
    pub updates: u64,
    /// The resolved configuration, as JSON.
    pub config: String,
    /// What data and frozen models the run has ([`Task::fingerprint`](crate::trainer::Task)).
    pub data: String,
    /// All parameters.
    pub store: ParameterStore,
}

const PARTS: [&str; 4] = ["weight", "first", "second", "ema"];

impl Checkpoint {
    /// Writes the checkpoint into `run_dir/checkpoints` and removes all but the newest `keep`.
    pub fn save(&self, run_dir: &Path, keep: usize) -> Result<PathBuf, TrainError> {
        let dir = run_dir.join("checkpoints");
        std::fs::create_dir_all(&dir).map_err(|source| TrainError::Io {
            path: dir.clone(),
            source,
        })?;
        let path = dir.join(format!("step-{:08}.safetensors", self.step));
        self.write(&path, None)?;
        for old in list(&dir)?.into_iter().rev().skip(keep.max(1)) {
            std::fs::remove_file(&old).map_err(|source| TrainError::Io { path: old, source })?;
        }
        Ok(path)
    }

    /// Keeps the checkpoint as `checkpoints/best.safetensors` if no earlier one had as high a score.
    pub fn save_if_best(&self, run_dir: &Path, score: f64) -> Result<(), TrainError> {
        let dir = run_dir.join("checkpoints");
        let path = dir.join("best.safetensors");
        let best = match path.exists() {
            true => WeightFiles::open(&path)?
                .metadata()
                .get("nitro.score")
                .cloned(),
            false => None,
        };
        if best
            .and_then(|text| text.parse().ok())
            .is_some_and(|best: f64| best >= score)
        {
            return Ok(());
        }
        std::fs::create_dir_all(&dir).map_err(|source| TrainError::Io { path: dir, source })?;
        self.write(&path, Some(score))
    }

    fn write(&self, path: &Path, score: Option<f64>) -> Result<(), TrainError> {
        let mut tensors = Vec::new();
        for (name, entry) in self.store.iter() {
            let parts = [&entry.value, &entry.first, &entry.second, &entry.ema];
            for (part, values) in PARTS.iter().zip(parts) {
                if !values.is_empty() {
                    let name = format!("{part}/{name}");
                    tensors.push((name, entry.shape.clone(), values.as_slice()));
                }
            }
        }
        let mut metadata = HashMap::from([
            ("nitro.step".to_owned(), self.step.to_string()),
            ("nitro.updates".to_owned(), self.updates.to_string()),
            ("nitro.run".to_owned(), self.config.clone()),
            ("nitro.data".to_owned(), self.data.clone()),
        ]);
        metadata.extend(score.map(|score| ("nitro.score".to_owned(), score.to_string())));
        let bytes: usize = tensors.iter().map(|(_, _, values)| 4 * values.len()).sum();
        save_safetensors(path, &tensors, &metadata, DType::F32).map_err(|error| match error {
            WeightError::Io { path, source } if is_full(source.kind()) => TrainError::DiskFull {
                path,
                megabytes: bytes as u64 / 1_000_000 + 1,
            },
            other => other.into(),
        })
    }

    /// The newest checkpoint of `run_dir`, if there is one.
    pub fn latest(run_dir: &Path) -> Result<Option<(PathBuf, Self)>, TrainError> {
        let dir = run_dir.join("checkpoints");
        if !dir.is_dir() {
            return Ok(None);
        }
        let Some(path) = list(&dir)?.pop() else {
            return Ok(None);
        };
        let checkpoint = Self::load(&path)?;
        Ok(Some((path, checkpoint)))
    }

    /// Reads a checkpoint.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let files = WeightFiles::open(path)?;
        let metadata = files.metadata();
        let field = |key: &str| {
            metadata
                .get(key)
                .cloned()
                .ok_or_else(|| TrainError::Resume {
                    path: path.to_owned(),
                    reason: format!("its metadata has no `{key}`; it is not a training checkpoint"),
                })
        };
        let number = |key: &str| {
            field(key)?.parse::<u64>().map_err(|_| TrainError::Resume {
                path: path.to_owned(),
                reason: format!("its metadata field `{key}` is not a number"),
            })
        };
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        for tensor in files.names() {
            let Some((part, name)) = tensor.split_once('/') else {
                continue;
            };
            let (shape, values) = files.read(tensor)?;
            let entry = entries.entry(name.to_owned()).or_default();
            entry.shape = shape;
            match part {
                "weight" => entry.value = values,
                "first" => entry.first = values,
                "second" => entry.second = values,
                _ => entry.ema = values,
            }
        }
        for entry in entries.values_mut() {
            entry.trainable = !entry.ema.is_empty();
        }
        Ok(Self {
            step: number("nitro.step")?,
            updates: number("nitro.updates")?,
            config: field("nitro.run")?,
            data: metadata.get("nitro.data").cloned().unwrap_or_default(),
            store: ParameterStore::from_entries(entries),
        })
    }
}

/// Whether a file could not be written for want of space.
fn is_full(kind: ErrorKind) -> bool {
    use ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded | FileTooLarge)
}

/// Checkpoint files of `dir`, oldest first.
fn list(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let io = |source| TrainError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for item in std::fs::read_dir(dir).map_err(io)? {
        let path = item.map_err(io)?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("step-") && name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
