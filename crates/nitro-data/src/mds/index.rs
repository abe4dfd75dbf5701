//! `index.json`: which shards a folder has.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Schema;
use crate::files::{read, write_whole};
use crate::{DataError, Result, python_json};

/// Name of the index in a dataset folder.
pub const INDEX: &str = "index.json";

/// A dataset folder's list of shards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Shards in order.
    pub shards: Vec<ShardInfo>,
    /// Version of the format: 2.
    pub version: u32,
}

/// A shard as the index describes it. Fields in the order in which Python writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// Encodings by column.
    pub column_encodings: Vec<String>,
    /// Columns, sorted.
    pub column_names: Vec<String>,
    /// Bytes of the columns of fixed size.
    pub column_sizes: Vec<Option<usize>>,
    /// Such as `zstd` or `zstd:7`.
    pub compression: Option<String>,
    /// `mds`.
    pub format: String,
    /// Hash algorithms applied to the files.
    pub hashes: Vec<String>,
    /// The shard uncompressed.
    pub raw_data: FileInfo,
    /// Samples in the shard.
    pub samples: usize,
    /// The size at which the writer began a new shard.
    pub size_limit: Option<serde_json::Value>,
    /// Version of the format: 2.
    pub version: u32,
    /// The shard compressed.
    pub zip_data: Option<FileInfo>,
}

/// A file of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Path relative to the dataset folder.
    pub basename: String,
    /// Size.
    pub bytes: u64,
    /// Hexadecimal digests by algorithm.
    pub hashes: BTreeMap<String, String>,
}

/// What a shard's header repeats of its description.
#[derive(Serialize)]
struct Config<'a> {
    column_encodings: &'a [String],
    column_names: &'a [String],
    column_sizes: &'a [Option<usize>],
    compression: &'a Option<String>,
    format: &'a str,
    hashes: &'a [String],
    size_limit: &'a Option<serde_json::Value>,
    version: u32,
}

impl ShardInfo {
    /// The shard's columns.
    pub fn schema(&self) -> Result<Schema> {
        let lengths = [self.column_encodings.len(), self.column_sizes.len()];
        if lengths != [self.column_names.len(); 2] {
            return Err(DataError::column(
                "",
                "names, encodings and sizes differ in number",
            ));
        }
        let columns = self.column_names.iter().zip(&self.column_encodings);
        let schema = Schema::in_order(columns.map(|(n, e)| (n.as_str(), e.as_str())))?;
        for (column, size) in schema.columns().iter().zip(&self.column_sizes) {
            // The reference takes a size of 0 for a variable one.
            if size.filter(|size| *size > 0) != column.size {
                let reason = format!("the index says {size:?} bytes for {}", column.encoding);
                return Err(DataError::column(&column.name, reason));
            }
        }
        Ok(schema)
    }

    /// The configuration that stands in the shard's header.
    pub(super) fn header(&self) -> Vec<u8> {
        let config = Config {
            column_encodings: &self.column_encodings,
            column_names: &self.column_names,
            column_sizes: &self.column_sizes,
            compression: &self.compression,
            format: &self.format,
            hashes: &self.hashes,
            size_limit: &self.size_limit,
            version: self.version,
        };
        python_json::dumps(&config).unwrap_or_default().into_bytes()
    }

    /// The file that is stored: compressed where the shard is compressed.
    pub fn stored(&self) -> &FileInfo {
        self.zip_data.as_ref().unwrap_or(&self.raw_data)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.version != 2 || self.format != "mds" {
            return Err(format!(
                "shards of format {:?} version {}; expected \"mds\" version 2",
                self.format, self.version
            ));
        }
        if self.compression.is_some() != self.zip_data.is_some() {
            return Err("compression and zip_data do not go together".to_owned());
        }
        for file in [Some(&self.raw_data), self.zip_data.as_ref()]
            .into_iter()
            .flatten()
        {
            // An index must not reach out of its folder.
            let inside = Path::new(&file.basename)
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
            if file.basename.is_empty() || !inside {
                return Err(format!("{:?} is no path within the folder", file.basename));
            }
        }
        self.schema().map(drop).map_err(|error| error.to_string())
    }
}

impl Index {
    /// Reads and checks the index of `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX);
        Self::parse(&read(&path)?).map_err(|reason| DataError::Index { path, reason })
    }

    /// Checks an index that is in memory.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let json: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
        let shards = json["shards"].as_array().ok_or("it lists no \"shards\"")?;
        if json["version"] != 2 {
            return Err(format!("version {}; expected 2", json["version"]));
        }
        let mut index = Self::of(Vec::with_capacity(shards.len()));
        for (i, shard) in shards.iter().enumerate() {
            let wrong = |reason: String| format!("shard {i}: {reason}");
            let format = shard["format"].as_str().unwrap_or("mds");
            if format != "mds" {
                return Err(wrong(format!("format {format:?}; expected \"mds\"")));
            }
            let info = ShardInfo::deserialize(shard).map_err(|e| wrong(e.to_string()))?;
            info.check().map_err(wrong)?;
            index.shards.push(info);
        }
        Ok(index)
    }

    /// An index of these shards.
    pub fn of(shards: Vec<ShardInfo>) -> Self {
        Self { shards, version: 2 }
    }

    /// Writes the index of `dir`, as Python's writer does.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_json(dir, self)
    }

    /// Samples in all shards.
    pub fn samples(&self) -> usize {
        self.shards.iter().map(|shard| shard.samples).sum()
    }
}

fn write_json(dir: &Path, index: &impl Serialize) -> Result<()> {
    let path = dir.join(INDEX);
    match python_json::dumps(index) {
        Ok(text) => write_whole(&path, text.as_bytes()),
        Err(e) => Err(DataError::Index {
            path,
            reason: e.to_string(),
        }),
    }
}

/// Joins the datasets in the sub-folders `parts` of `dir`, in this order, by writing `dir/index.json`.
/// Gives the joined index.
pub fn merge_index(dir: &Path, parts: &[PathBuf]) -> Result<Index> {
    let mut merged = Index::of(Vec::new());
    for part in parts {
        let prefix = part
            .components()
            .map(|component| component.as_os_str().to_string_lossy())
            .collect::<Vec<_>>()
            .join("/");
        for mut shard in Index::read(&dir.join(part))?.shards {
            for file in [Some(&mut shard.raw_data), shard.zip_data.as_mut()]
                .into_iter()
                .flatten()
            {
                file.basename = format!("{prefix}/{}", file.basename);
            }
            merged.shards.push(shard);
        }
    }
    // Python's `merge_index` writes the version first, its writer the keys sorted.
    #[derive(Serialize)]
    struct Joined<'a> {
        version: u32,
        shards: &'a [ShardInfo],
    }
    let joined = Joined {
        version: merged.version,
        shards: &merged.shards,
    };
    write_json(dir, &joined)?;
    Ok(merged)
}
