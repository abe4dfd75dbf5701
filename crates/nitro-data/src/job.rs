//! Long writing jobs that can be killed at any moment and go on without a lost or doubled sample.
//!
//! Beside the shards the output folder holds two files while the job runs:
//!
//! - `nitro-job.json`: what the job is, the shards that are complete, and how far the job had come
//!   when the last of them was written;
//! - `nitro-job.pending`: the samples of the open shard, each with the progress made by it, appended
//!   as they come. A torn last record is recognised by its checksum and dropped.
//!
//! `index.json` is written at the end, as every reader expects.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use xxhash_rust::xxh3::xxh3_64;

use crate::files::{read, write_whole};
use crate::mds::{INDEX, Index, Schema, ShardInfo, Value, Writer, WriterOptions, merge_index};
use crate::{DataError, Result};

/// Name of the job file.
pub const JOB: &str = "nitro-job.json";
const PENDING: &str = "nitro-job.pending";
const LOCK: &str = "nitro-job.lock";

/// What a job did with the records it has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Samples written.
    pub written: u64,
    /// Records left out, by reason.
    pub skipped: BTreeMap<String, Skipped>,
}

/// Records left out for one reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How many, exactly.
    pub count: u64,
    /// The first few, with details.
    pub examples: Vec<String>,
}

/// Records that are remembered of each reason.
const EXAMPLES: usize = 5;

impl Tally {
    /// Counts a record that is left out.
    pub fn skip(&mut self, reason: &str, record: impl FnOnce() -> String) {
        let skipped = self.skipped.entry(reason.to_owned()).or_default();
        skipped.count += 1;
        if skipped.examples.len() < EXAMPLES {
            skipped.examples.push(record());
        }
    }

    /// Adds what another process did.
    pub fn add(&mut self, other: Tally) {
        self.written += other.written;
        for (reason, more) in other.skipped {
            let skipped = self.skipped.entry(reason).or_default();
            skipped.count += more.count;
            skipped.examples.extend(more.examples);
            skipped.examples.truncate(EXAMPLES);
        }
    }

    /// Records left out for all reasons.
    pub fn skipped(&self) -> u64 {
        self.skipped.values().map(|skipped| skipped.count).sum()
    }

    /// Written and left out.
    pub fn seen(&self) -> u64 {
        self.written + self.skipped()
    }
}

/// Which share of a job this process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// This process, from 0.
    pub rank: usize,
    /// Processes that share the job.
    pub ranks: usize,
}

impl Share {
    /// The whole job.
    pub const WHOLE: Share = Share { rank: 0, ranks: 1 };

    /// The folder of this process: `out` itself if it works alone, else `out/RANK`.
    ///
    /// # Errors
    /// A rank outside of the ranks.
    pub fn folder(self, out: &Path) -> Result<PathBuf> {
        match self {
            Share { rank: 0, ranks: 1 } => Ok(out.to_owned()),
            Share { rank, ranks } if rank < ranks => Ok(out.join(rank.to_string())),
            Share { rank, ranks } => Err(DataError::Order(format!(
                "rank {rank} of {ranks}; expected a rank below the number of ranks"
            ))),
        }
    }

    /// The part of `count` things that is this process's: contiguous, so that the merged dataset
    /// has them in order.
    pub fn range(self, count: usize) -> Range<usize> {
        count * self.rank / self.ranks..count * (self.rank + 1) / self.ranks
    }

    /// Joins the folders of all ranks in `out/index.json` once all are finished. Says whether they
    /// are.
    pub fn merge(self, out: &Path) -> Result<bool> {
        if self.ranks == 1 {
            return Ok(true);
        }
        let parts: Vec<PathBuf> = (0..self.ranks)
            .map(|r| PathBuf::from(r.to_string()))
            .collect();
        if !parts.iter().all(|part| out.join(part).join(INDEX).exists()) {
            return Ok(false);
        }
        // Ranks that finish together write the same index.
        merge_index(out, &parts).map(|_| true)
    }
}

#[derive(Serialize, Deserialize)]
struct State<P> {
    /// What the job does: it goes on only as the same job.
    job: Json,
    /// Columns and their encodings.
    columns: Vec<(String, String)>,
    finished: bool,
    /// Samples in `shards`.
    samples: usize,
    progress: P,
    shards: Vec<ShardInfo>,
}

/// A dataset folder being written by a job whose progress is a `P`.
#[derive(Debug)]
pub struct Job<P> {
    dir: PathBuf,
    job: Json,
    writer: Writer,
    /// Samples in complete shards.
    committed: usize,
    /// Behind the newest sample.
    progress: P,
    finished: bool,
    pending: BufWriter<File>,
    /// Held while the job runs, so that two processes do not write one folder.
    _lock: File,
}

impl<P: Serialize + DeserializeOwned + Clone> Job<P> {
    /// Begins the job described by `job` in `dir`, or goes on with it where it stopped.
    ///
    /// # Errors
    /// The folder holds something else, or another process is at work in it.
    pub fn open(
        dir: &Path,
        schema: Schema,
        options: WriterOptions,
        job: Json,
        start: P,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(DataError::io("make folder", dir))?;
        let refuse = |reason: String| DataError::Job {
            dir: dir.to_owned(),
            reason,
        };
        let lock_path = dir.join(LOCK);
        let lock = File::create(&lock_path).map_err(DataError::io("open", &lock_path))?;
        if lock.try_lock().is_err() {
            return Err(refuse(
                "another process is writing here; let it finish".to_owned(),
            ));
        }
        let path = dir.join(JOB);
        let state: Option<State<P>> = match path.exists() {
            false => None,
            true => Some(serde_json::from_slice(&read(&path)?).map_err(|e| {
                refuse(format!(
                    "{JOB} cannot be read ({e}); remove the folder to begin anew"
                ))
            })?),
        };
        let columns = schema.pairs();
        let (progress, shards, committed, finished) = match state {
            None if dir.join(INDEX).exists() => {
                return Err(refuse(
                    "holds a dataset already; choose another folder".to_owned(),
                ));
            }
            None => (start, Vec::new(), 0, false),
            Some(state) => {
                if state.job != job || state.columns != columns {
                    return Err(refuse(format!(
                        "holds another job, {}; this one is {job}. Choose another folder, or remove \
                         this one",
                        state.job
                    )));
                }
                (state.progress, state.shards, state.samples, state.finished)
            }
        };
        let writer = Writer::resume(dir, schema, options, shards)?;
        let pending_path = dir.join(PENDING);
        let pending = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&pending_path)
            .map_err(DataError::io("open", &pending_path))?;
        let mut this = Self {
            dir: dir.to_owned(),
            job,
            writer,
            committed,
            progress,
            finished,
            pending: BufWriter::new(pending),
            _lock: lock,
        };
        this.recover()?;
        if !path.exists() {
            this.save(false)?;
        }
        Ok(this)
    }

    /// How far the job has come.
    pub fn progress(&self) -> &P {
        &self.progress
    }

    /// Samples written.
    pub fn samples(&self) -> usize {
        self.committed + self.writer.open_samples()
    }

    /// Whether the job was done before.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Adds a sample. `progress` is how far the job has come with it.
    pub fn write(&mut self, values: &[(&str, Value)], progress: P) -> Result<()> {
        let bytes = self.writer.schema().encode(values)?;
        if self.writer.is_full_for(bytes.len()) {
            self.commit(false)?;
        }
        self.append(&bytes, &progress)?;
        self.writer.push(bytes);
        self.progress = progress;
        Ok(())
    }

    /// Writes what is open and the index. `progress` also covers what came behind the last sample.
    pub fn finish(mut self, progress: P) -> Result<Index> {
        if !self.finished {
            self.progress = progress;
            // The index comes first: a job that claims to be finished has one.
            self.commit(false)?;
            Index::of(self.writer.shards().to_vec()).write(&self.dir)?;
            self.save(true)?;
        }
        for name in [PENDING, LOCK] {
            let path = self.dir.join(name);
            std::fs::remove_file(&path).map_err(DataError::io("remove", &path))?;
        }
        Index::read(&self.dir)
    }

    fn commit(&mut self, finished: bool) -> Result<()> {
        self.writer.flush()?;
        self.committed = self.writer.shards().iter().map(|shard| shard.samples).sum();
        self.save(finished)?;
        let path = self.dir.join(PENDING);
        let emptied = self.pending.flush().and_then(|()| {
            self.pending.get_mut().set_len(0)?;
            self.pending.rewind()
        });
        emptied.map_err(DataError::io("empty", &path))
    }

    fn save(&self, finished: bool) -> Result<()> {
        let state = State {
            job: self.job.clone(),
            columns: self.writer.schema().pairs(),
            finished,
            samples: self.committed,
            progress: self.progress.clone(),
            shards: self.writer.shards().to_vec(),
        };
        let path = self.dir.join(JOB);
        let text = serde_json::to_vec(&state).map_err(|e| DataError::Job {
            dir: self.dir.clone(),
            reason: e.to_string(),
        })?;
        write_whole(&path, &text)
    }

    /// One record: checksum, number of the sample, two lengths, progress, sample.
    fn append(&mut self, sample: &[u8], progress: &P) -> Result<()> {
        let path = self.dir.join(PENDING);
        let progress = serde_json::to_vec(progress).unwrap_or_default();
        let mut record = Vec::with_capacity(24 + progress.len() + sample.len());
        record.extend((self.samples() as u64).to_le_bytes());
        record.extend((progress.len() as u32).to_le_bytes());
        record.extend((sample.len() as u32).to_le_bytes());
        record.extend(progress);
        record.extend(sample);
        self.pending
            .write_all(&xxh3_64(&record).to_le_bytes())
            .and_then(|()| self.pending.write_all(&record))
            .and_then(|()| self.pending.flush())
            .map_err(DataError::io("append to", &path))
    }

    /// Takes the samples of the open shard back, up to a torn record.
    fn recover(&mut self) -> Result<()> {
        let path = self.dir.join(PENDING);
        let bytes = read(&path)?;
        let mut rest = bytes.as_slice();
        while let Some((record, behind)) = Record::parse(rest) {
            // Records before `committed` are of a shard that was completed just before a kill.
            if record.number as usize == self.samples() {
                let Ok(progress) = serde_json::from_slice(record.progress) else {
                    break;
                };
                self.progress = progress;
                self.writer.push(record.sample.to_vec());
            }
            rest = behind;
        }
        let whole = (bytes.len() - rest.len()) as u64;
        let file = self.pending.get_mut();
        file.set_len(whole).map_err(DataError::io("shorten", &path))
    }
}

struct Record<'a> {
    number: u64,
    progress: &'a [u8],
    sample: &'a [u8],
}

impl<'a> Record<'a> {
    /// The first record of `bytes`, if it is whole, and what follows it.
    fn parse(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (checksum, body) = bytes.split_first_chunk::<8>()?;
        let (number, rest) = body.split_first_chunk::<8>()?;
        let (progress_len, rest) = rest.split_first_chunk::<4>()?;
        let (sample_len, rest) = rest.split_first_chunk::<4>()?;
        let (progress, rest) = rest.split_at_checked(u32::from_le_bytes(*progress_len) as usize)?;
        let (sample, behind) = rest.split_at_checked(u32::from_le_bytes(*sample_len) as usize)?;
        let record = &body[..body.len() - behind.len()];
        let record = (xxh3_64(record).to_le_bytes() == *checksum).then_some(Self {
            number: u64::from_le_bytes(*number),
            progress,
            sample,
        })?;
        Some((record, behind))
    }
}
