//! Reading: one or several dataset folders as one list of samples.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use super::shard::Shard;
use super::{Index, Sample, Schema, ShardInfo};
use crate::{DataError, Result};

/// What is checked when a shard is first used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Size, number of samples, offsets.
    #[default]
    Structure,
    /// That, and all hashes that the index has. Reads the whole shard.
    Hashes,
}

/// What happens to samples of damaged shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDamage {
    /// They are errors.
    #[default]
    Fail,
    /// They are left out and counted in [`Dataset::damage`].
    Skip,
}

/// How a [`Dataset`] is read.
#[derive(Debug, Clone, Default)]
pub struct DatasetOptions {
    /// What is checked.
    pub verify: Verify,
    /// What happens to samples of damaged shards.
    pub on_damage: OnDamage,
    /// Where compressed shards are expanded [default: the system's folder for temporary files].
    /// The files are removed with the dataset.
    pub scratch: Option<PathBuf>,
}

/// Samples that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The shard.
    pub shard: PathBuf,
    /// What is wrong with it.
    pub reason: String,
    /// Samples lost: all of the shard, or those found damaged.
    pub samples: usize,
}

/// One or several dataset folders as one list of samples, in the order of their indexes. Shards are
/// opened and checked when they are first used.
#[derive(Debug)]
pub struct Dataset {
    folders: Vec<PathBuf>,
    entries: Vec<Entry>,
    /// Number of the first sample of each shard, and behind them the number of samples.
    firsts: Vec<usize>,
    /// Shards of each folder.
    streams: Vec<Range<usize>>,
    options: DatasetOptions,
    scratch: OnceLock<Result<tempfile::TempDir>>,
    damage: Mutex<BTreeMap<usize, Lost>>,
}

#[derive(Debug)]
struct Entry {
    folder: usize,
    info: ShardInfo,
    schema: Arc<Schema>,
    shard: OnceLock<Result<Shard>>,
}

#[derive(Debug)]
struct Lost {
    reason: String,
    /// `None`: the whole shard.
    samples: Option<BTreeSet<usize>>,
}

impl Dataset {
    /// Opens one folder with the default options.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_all(&[folder.as_ref().to_owned()], DatasetOptions::default())
    }

    /// Opens several folders as one list, one behind the other.
    ///
    /// # Errors
    /// A missing or unreadable index, or folders without a single sample.
    pub fn open_all(folders: &[PathBuf], options: DatasetOptions) -> Result<Self> {
        let (mut entries, mut firsts, mut streams) = (Vec::<Entry>::new(), vec![0], Vec::new());
        for (folder, dir) in folders.iter().enumerate() {
            let begin = entries.len();
            for info in Index::read(dir)?.shards {
                firsts.push(firsts.last().unwrap_or(&0) + info.samples);
                let schema = info.schema()?;
                // Shards of one dataset share their columns.
                let schema = match entries.last() {
                    Some(last) if *last.schema == schema => last.schema.clone(),
                    _ => Arc::new(schema),
                };
                entries.push(Entry {
                    folder,
                    info,
                    schema,
                    shard: OnceLock::new(),
                });
            }
            streams.push(begin..entries.len());
            if entries[begin..].iter().all(|entry| entry.info.samples == 0) {
                return Err(DataError::Index {
                    path: dir.join(super::INDEX),
                    reason: "lists no samples".to_owned(),
                });
            }
        }
        if entries.is_empty() {
            return Err(DataError::Order("no dataset folder was given".to_owned()));
        }
        Ok(Self {
            folders: folders.to_vec(),
            entries,
            firsts,
            streams,
            options,
            scratch: OnceLock::new(),
            damage: Mutex::new(BTreeMap::new()),
        })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.firsts.last().copied().unwrap_or(0)
    }

    /// Whether there is no sample; never of an opened dataset.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The folders.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Descriptions of all shards, in order.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &ShardInfo> {
        self.entries.iter().map(|entry| &entry.info)
    }

    /// Samples of each shard, folder by folder.
    pub fn shard_sizes(&self) -> Vec<Vec<usize>> {
        let sizes = |shards: &Range<usize>| {
            let entries = &self.entries[shards.clone()];
            entries.iter().map(|entry| entry.info.samples).collect()
        };
        self.streams.iter().map(sizes).collect()
    }

    /// Columns of the first shard.
    pub fn schema(&self) -> &Schema {
        &self.entries[0].schema
    }

    /// Checks that every shard has these columns.
    pub fn require(&self, columns: &[&str]) -> Result<()> {
        for entry in &self.entries {
            let missing = columns
                .iter()
                .find(|name| entry.schema.position(name).is_none());
            if let Some(name) = missing {
                let names: Vec<&str> = entry.info.column_names.iter().map(String::as_str).collect();
                let shard = self.folders[entry.folder].join(&entry.info.stored().basename);
                let reason = format!("{} has only {}", shard.display(), names.join(", "));
                return Err(DataError::column(name, reason));
            }
        }
        Ok(())
    }

    /// The shard with sample `index`, and the sample's number in it.
    pub fn locate(&self, index: usize) -> Result<(usize, usize)> {
        if index >= self.len() {
            let what = format!("sample {index} asked of {}", self.len());
            return Err(DataError::Order(what));
        }
        let shard = self.firsts.partition_point(|first| *first <= index) - 1;
        Ok((shard, index - self.firsts[shard]))
    }

    fn scratch(&self) -> Result<PathBuf> {
        let parent = self
            .options
            .scratch
            .clone()
            .unwrap_or_else(std::env::temp_dir);
        let made = self.scratch.get_or_init(|| {
            std::fs::create_dir_all(&parent)
                .and_then(|()| {
                    tempfile::Builder::new()
                        .prefix("nitro-mds-")
                        .tempdir_in(&parent)
                })
                .map_err(DataError::io("make a folder in", &parent))
        });
        made.as_ref()
            .map(|dir| dir.path().to_owned())
            .map_err(Clone::clone)
    }

    fn shard(&self, number: usize) -> Result<&Shard> {
        let entry = &self.entries[number];
        let opened = entry.shard.get_or_init(|| {
            let dir = &self.folders[entry.folder];
            let scratch = match entry.info.compression {
                Some(_) => self.scratch()?.join(entry.folder.to_string()),
                None => PathBuf::new(),
            };
            Shard::open(
                dir,
                &entry.info,
                entry.schema.clone(),
                self.options.verify,
                &scratch,
            )
        });
        opened.as_ref().map_err(|error| {
            if let DataError::Damaged { reason, .. } = error {
                self.note(number, None, reason);
            }
            error.clone()
        })
    }

    fn note(&self, shard: usize, sample: Option<usize>, reason: &str) {
        let mut damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = damage.entry(shard).or_insert_with(|| Lost {
            reason: reason.to_owned(),
            samples: sample.map(|_| BTreeSet::new()),
        });
        match (&mut lost.samples, sample) {
            (Some(samples), Some(sample)) => drop(samples.insert(sample)),
            (samples, None) => *samples = None,
            (None, Some(_)) => {}
        }
    }

    /// Sample `index`, as raw bytes of its columns.
    pub fn sample(&self, index: usize) -> Result<Sample> {
        let (number, within) = self.locate(index)?;
        self.shard(number)?.sample(within).inspect_err(|error| {
            if let DataError::Damaged { reason, .. } = error {
                self.note(number, Some(within), reason);
            }
        })
    }

    /// Sample `index` worked up by `decode`. `None`: it is damaged, and such samples are to be
    /// skipped; it is counted. A value that is not of its column's encoding counts as damage too.
    pub fn decoded<T>(
        &self,
        index: usize,
        decode: impl FnOnce(&Sample) -> Result<T>,
    ) -> Result<Option<T>> {
        let outcome = self.sample(index).and_then(|sample| {
            decode(&sample).map_err(|error| match error {
                DataError::Column { .. } => {
                    let (number, within) = self.locate(index).unwrap_or_default();
                    let reason = format!("sample {within}: {error}");
                    self.note(number, Some(within), &reason);
                    DataError::Damaged {
                        shard: self.path(number),
                        reason,
                    }
                }
                other => other,
            })
        });
        match (outcome, self.options.on_damage) {
            (Err(DataError::Damaged { .. }), OnDamage::Skip) => Ok(None),
            (outcome, _) => outcome.map(Some),
        }
    }

    fn path(&self, shard: usize) -> PathBuf {
        let entry = &self.entries[shard];
        self.folders[entry.folder].join(&entry.info.stored().basename)
    }

    /// Bytes of every column of sample `index`, in the order of its shard's schema.
    pub fn column_sizes(&self, index: usize) -> Result<Vec<usize>> {
        let (number, within) = self.locate(index)?;
        self.shard(number)?.column_sizes(within)
    }

    /// The damage met so far.
    pub fn damage(&self) -> Vec<Damage> {
        let damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = |(&shard, lost): (&usize, &Lost)| Damage {
            shard: self.path(shard),
            reason: lost.reason.clone(),
            samples: match &lost.samples {
                Some(samples) => samples.len(),
                None => self.entries[shard].info.samples,
            },
        };
        damage.iter().map(lost).collect()
    }

    /// Reads every shard and the structure of every sample, telling `each` shard that is done.
    /// Gives the damage found; with [`Verify::Hashes`] all bytes are checked.
    pub fn check(&self, mut each: impl FnMut(usize)) -> Result<Vec<Damage>> {
        for (number, entry) in self.entries.iter().enumerate() {
            match self.shard(number) {
                Err(DataError::Damaged { .. }) => {}
                Err(error) => return Err(error),
                Ok(shard) => {
                    for within in 0..entry.info.samples {
                        if let Err(DataError::Damaged { reason, .. }) = shard.column_sizes(within) {
                            self.note(number, Some(within), &reason);
                        }
                    }
                }
            }
            each(number + 1);
        }
        Ok(self.damage())
    }
}
