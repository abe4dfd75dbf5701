//! Raw image-text sets to MDS shards with the columns `caption` (`str`) and, where the source has
//! pictures, `jpg` (`jpeg`): the columns of the official pipeline.
//!
//! A [`Source`] is cut into units (a tar, a row group, a thousand files), which ranks share. Every
//! record of a source is either written or counted under a reason.

mod folder;
mod jsonl;
mod parquet;
mod prepare;
mod tars;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::folder::Folder;
pub use self::jsonl::JourneyDb;
pub use self::parquet::{ParquetPictures, ParquetRows, text_column};
pub use self::prepare::PictureRules;
pub use self::tars::Tars;

use crate::job::{Job, Share, Tally};
use crate::mds::{Index, Schema, Value, WriterOptions};
use crate::{DataError, Result};

/// Column of captions.
pub const CAPTION: &str = "caption";
/// Column of pictures.
pub const JPG: &str = "jpg";

/// A record of a source: where it came from, and what it holds or why it cannot be used.
#[derive(Debug)]
pub struct Record {
    /// Name for people: a path, a key, a row.
    pub id: String,
    /// The content, or why there is none.
    pub content: std::result::Result<Content, Skip>,
}

/// What a record holds.
#[derive(Debug)]
pub struct Content {
    /// The caption.
    pub caption: String,
    /// The picture, if the source has pictures.
    pub picture: Option<Payload>,
}

/// An encoded picture.
#[derive(Debug)]
pub enum Payload {
    /// In a file of its own.
    File(PathBuf),
    /// In memory.
    Bytes(Vec<u8>),
}

/// Why a record is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// The reason under which it is counted.
    pub reason: &'static str,
    /// Details of this record.
    pub detail: String,
}

impl Skip {
    pub(crate) fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

/// A raw dataset.
pub trait Source: Send + Sync {
    /// What this source is, so that a resumed job can tell that it is still the same.
    fn describe(&self) -> serde_json::Value;

    /// Whether records have pictures.
    fn has_pictures(&self) -> bool;

    /// Number of units.
    fn units(&self) -> usize;

    /// Gives all records of a unit in a fixed order. Errors of `sink` end the reading.
    fn read_unit(&self, unit: usize, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()>;
}

/// How a source is ingested.
#[derive(Debug, Clone)]
pub struct IngestOptions {
    /// Which pictures are taken, and how they are changed.
    pub pictures: PictureRules,
    /// Shards.
    pub writer: WriterOptions,
    /// Stop after this many samples (of this rank).
    pub limit: Option<u64>,
    /// This process's share.
    pub share: Share,
}

/// How far an ingest has come: behind which record of which unit, and what it did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    unit: usize,
    record: u64,
    /// Records so far.
    pub tally: Tally,
}

/// What an ingest did.
#[derive(Debug)]
pub struct Ingested {
    /// The shards of this rank.
    pub index: Index,
    /// Records of this rank, over all runs of the job.
    pub tally: Tally,
    /// What earlier runs had done of it.
    pub before: Tally,
    /// Whether all ranks are done and `index.json` stands in the output folder itself.
    pub complete: bool,
}

/// Records that are prepared together, in parallel.
const CHUNK: usize = 64;

/// Writes the records of `source` into `out`; goes on where an earlier run of the same job stopped.
/// `each` hears the progress and answers whether to go on.
pub fn ingest(
    source: &dyn Source,
    out: &Path,
    options: &IngestOptions,
    each: &mut dyn FnMut(&Tally) -> bool,
) -> Result<Ingested> {
    let folder = options.share.folder(out)?;
    let columns: &[(&str, &str)] = match source.has_pictures() {
        true => &[(CAPTION, "str"), (JPG, "jpeg")],
        false => &[(CAPTION, "str")],
    };
    let about = json!({
        "ingest": source.describe(),
        "pictures": options.pictures,
        "limit": options.limit,
        "rank": options.share.rank,
        "ranks": options.share.ranks,
    });
    let schema = Schema::new(columns.iter().copied())?;
    let writer = options.writer.clone();
    let job = Job::open(&folder, schema, writer, about, Progress::default())?;
    let mut run = Run {
        progress: job.progress().clone(),
        job,
        options,
        waiting: Vec::with_capacity(CHUNK),
        each,
    };
    let before = run.progress.tally.clone();
    if !run.job.is_finished() {
        let first = run.progress.unit;
        let mine = |unit: &usize| unit % options.share.ranks == options.share.rank;
        for unit in (first..source.units()).filter(mine) {
            if run.is_full() {
                break;
            }
            run.unit(source, unit)?;
        }
    }
    let tally = run.progress.tally.clone();
    let index = run.job.finish(run.progress)?;
    Ok(Ingested {
        index,
        tally,
        before,
        complete: options.share.merge(out)?,
    })
}

struct Run<'a> {
    job: Job<Progress>,
    options: &'a IngestOptions,
    progress: Progress,
    waiting: Vec<Record>,
    each: &'a mut dyn FnMut(&Tally) -> bool,
}

impl Run<'_> {
    fn is_full(&self) -> bool {
        let limit = self.options.limit.unwrap_or(u64::MAX);
        self.progress.tally.written >= limit
    }

    fn unit(&mut self, source: &dyn Source, unit: usize) -> Result<()> {
        if unit != self.progress.unit {
            self.progress.unit = unit;
            self.progress.record = 0;
        }
        let mut seen = self.progress.record;
        let read = source.read_unit(unit, &mut |record| {
            if seen > 0 {
                seen -= 1;
                return Ok(());
            }
            self.waiting.push(record);
            match self.waiting.len() < CHUNK {
                true => Ok(()),
                false => self.write_waiting(),
            }
        });
        match read.and_then(|()| self.write_waiting()) {
            Err(DataError::Stopped) if self.is_full() => Ok(()),
            Ok(()) => {
                self.progress.unit = unit + 1;
                self.progress.record = 0;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn write_waiting(&mut self) -> Result<()> {
        let rules = &self.options.pictures;
        let chunk = std::mem::take(&mut self.waiting);
        let prepared: Vec<_> = chunk
            .into_par_iter()
            .map(|Record { id, content }| {
                let content = content.and_then(|content| rules.prepare(content));
                (id, content)
            })
            .collect();
        for (id, content) in prepared {
            if self.is_full() {
                return Err(DataError::Stopped);
            }
            self.progress.record += 1;
            let tally = &mut self.progress.tally;
            match content {
                Err(skip) => tally.skip(skip.reason, || match skip.detail.is_empty() {
                    true => id,
                    false => format!("{id}: {}", skip.detail),
                }),
                Ok((caption, picture)) => {
                    tally.written += 1;
                    let mut values = vec![(CAPTION, Value::Str(caption))];
                    values.extend(picture.map(|picture| (JPG, Value::Image(picture))));
                    self.job.write(&values, self.progress.clone())?;
                }
            }
        }
        match (self.each)(&self.progress.tally) {
            true => Ok(()),
            false => Err(DataError::Stopped),
        }
    }
}

/// A caption without the white space around it, if anything is left.
fn caption(text: &str) -> std::result::Result<String, Skip> {
    match text.trim() {
        "" => Err(Skip::new("empty caption", "")),
        text => Ok(text.to_owned()),
    }
}

/// Whether a file name is that of a picture.
fn is_picture(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    ["jpg", "jpeg", "png", "webp"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

/// Files below `root` for which `wanted` holds, sorted, so that every run sees the same order.
fn files_below(root: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(root)
        .follow_links(true)
        .sort_by_file_name()
    {
        let entry = entry.map_err(|e| DataError::Source {
            path: root.to_owned(),
            reason: e.to_string(),
        })?;
        if entry.file_type().is_file() && wanted(entry.path()) {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

/// Number and fingerprint of a list of files, by which a resumed job knows its source again.
fn listing(files: &[PathBuf]) -> serde_json::Value {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for file in files {
        hash.update(file.as_os_str().as_encoded_bytes());
        hash.update(&[0]);
    }
    json!({"files": files.len(), "listing": format!("{:016x}", hash.digest())})
}
