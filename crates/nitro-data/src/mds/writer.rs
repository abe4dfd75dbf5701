//! Writing a dataset folder, byte for byte as mosaicml-streaming's `MDSWriter` does.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::shard::ShardBuilder;
use super::{FileInfo, Hash, INDEX, Index, Schema, ShardInfo, Value};
use crate::files::write_whole;
use crate::{DataError, Result};

/// How shards are compressed: `zstd`, or `zstd:LEVEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// 1 to 22; `None` is zstd's own default, 3.
    pub level: Option<u8>,
}

impl FromStr for Compression {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || DataError::Unknown {
            what: "compression",
            name: name.to_owned(),
            expected: "zstd or zstd:LEVEL with a level of 1 to 22",
        };
        match name.split_once(':') {
            None if name == "zstd" => Ok(Self { level: None }),
            Some(("zstd", level)) => {
                let level = level.parse().ok().filter(|level| (1..=22).contains(level));
                Ok(Self {
                    level: Some(level.ok_or_else(unknown)?),
                })
            }
            _ => Err(unknown()),
        }
    }
}

impl Compression {
    fn name(self) -> String {
        match self.level {
            None => "zstd".to_owned(),
            Some(level) => format!("zstd:{level}"),
        }
    }
}

/// Settings of a [`Writer`].
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Compress shards.
    pub compression: Option<Compression>,
    /// Hashes to store for every file.
    pub hashes: Vec<Hash>,
    /// A shard's size at most, unless a single sample is larger. Below 4 GiB.
    pub size_limit: u64,
}

impl Default for WriterOptions {
    /// No compression, no hashes, 64 MiB: the reference's defaults.
    fn default() -> Self {
        Self {
            compression: None,
            hashes: Vec::new(),
            size_limit: 1 << 26,
        }
    }
}

/// Writes a dataset folder. Shards appear whole, and the index last: a folder with an index is
/// complete.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    schema: Schema,
    options: WriterOptions,
    /// What all shards have in common.
    template: ShardInfo,
    header: Vec<u8>,
    builder: ShardBuilder,
    shards: Vec<ShardInfo>,
}

impl Writer {
    /// Begins a dataset in `dir`, which is made if missing and may not hold one.
    pub fn create(dir: &Path, schema: Schema, options: WriterOptions) -> Result<Self> {
        if dir.join(INDEX).exists() {
            return Err(DataError::Job {
                dir: dir.to_owned(),
                reason: "holds a dataset already; choose another folder".to_owned(),
            });
        }
        Self::resume(dir, schema, options, Vec::new())
    }

    /// Goes on behind `shards`, which an earlier writer of the same settings made in `dir`.
    pub fn resume(
        dir: &Path,
        schema: Schema,
        mut options: WriterOptions,
        shards: Vec<ShardInfo>,
    ) -> Result<Self> {
        if options.size_limit == 0 || options.size_limit > u64::from(u32::MAX) {
            return Err(DataError::Job {
                dir: dir.to_owned(),
                reason: format!(
                    "a shard size of {} bytes; expected 1 byte to 4 GiB",
                    options.size_limit
                ),
            });
        }
        options.hashes.sort_by_key(|hash| hash.name());
        options.hashes.dedup();
        std::fs::create_dir_all(dir).map_err(DataError::io("make folder", dir))?;
        let columns = schema.columns();
        let template = ShardInfo {
            column_encodings: columns.iter().map(|c| c.encoding.to_string()).collect(),
            column_names: columns.iter().map(|c| c.name.clone()).collect(),
            column_sizes: columns.iter().map(|c| c.size).collect(),
            compression: options.compression.map(Compression::name),
            format: "mds".to_owned(),
            hashes: options.hashes.iter().map(|h| h.name().to_owned()).collect(),
            raw_data: file_info(String::new(), &[], &[]),
            samples: 0,
            size_limit: Some(options.size_limit.into()),
            version: 2,
            zip_data: None,
        };
        Ok(Self {
            dir: dir.to_owned(),
            schema,
            options,
            header: template.header(),
            template,
            builder: ShardBuilder::default(),
            shards,
        })
    }

    /// The columns.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Shards written so far.
    pub fn shards(&self) -> &[ShardInfo] {
        &self.shards
    }

    /// Samples of the shard that is being filled.
    pub fn open_samples(&self) -> usize {
        self.builder.len()
    }

    /// Adds a sample. Columns may come in any order. Where the sample no longer fits, the shard
    /// before it is written first.
    pub fn write(&mut self, values: &[(&str, Value)]) -> Result<()> {
        let bytes = self.schema.encode(values)?;
        if self.is_full_for(bytes.len()) {
            self.flush()?;
        }
        self.push(bytes);
        Ok(())
    }

    /// Whether a sample of `bytes` bytes belongs into the next shard.
    pub(crate) fn is_full_for(&self, bytes: usize) -> bool {
        let size = self.builder.size_with(bytes, &self.header) as u64;
        size > self.options.size_limit && self.builder.len() > 0
    }

    /// Adds an encoded sample to the open shard.
    pub(crate) fn push(&mut self, bytes: Vec<u8>) {
        self.builder.push(bytes);
    }

    /// Writes the open shard, if it has samples.
    pub fn flush(&mut self) -> Result<()> {
        if self.builder.len() == 0 {
            return Ok(());
        }
        let samples = self.builder.len();
        let raw = self.builder.take(&self.header);
        if raw.len() as u64 > u64::from(u32::MAX) {
            return Err(DataError::column("", "a sample of 4 GiB or more"));
        }
        let name = format!("shard.{:05}.mds", self.shards.len());
        let hashes = &self.options.hashes;
        let mut info = ShardInfo {
            samples,
            raw_data: file_info(name.clone(), &raw, hashes),
            ..self.template.clone()
        };
        let stored = match self.options.compression {
            None => raw,
            Some(compression) => {
                let level = i32::from(compression.level.unwrap_or(3));
                let path = self.dir.join(&name);
                let zip =
                    zstd::bulk::compress(&raw, level).map_err(DataError::io("compress", &path))?;
                info.zip_data = Some(file_info(format!("{name}.zstd"), &zip, hashes));
                zip
            }
        };
        write_whole(&self.dir.join(&info.stored().basename), &stored)?;
        self.shards.push(info);
        Ok(())
    }

    /// Writes the last shard and the index.
    pub fn finish(mut self) -> Result<Index> {
        self.flush()?;
        let index = Index::of(self.shards);
        index.write(&self.dir)?;
        Ok(index)
    }
}

fn file_info(basename: String, data: &[u8], hashes: &[Hash]) -> FileInfo {
    FileInfo {
        basename,
        bytes: data.len() as u64,
        hashes: hashes
            .iter()
            .map(|hash| (hash.name().to_owned(), hash.digest(data)))
            .collect(),
    }
}
