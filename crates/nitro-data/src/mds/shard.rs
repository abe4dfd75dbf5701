//! One shard's bytes: checked when it is opened, so that samples are plain slices after that.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nitro_kernels::mapped_file::MappedFile;

use super::{Hash, Sample, Schema, ShardInfo, Verify};
use crate::files::write_whole;
use crate::{DataError, Result};

/// An opened shard.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    schema: Arc<Schema>,
    samples: usize,
    data: MappedFile,
}

impl Shard {
    /// Opens a shard of the dataset folder `dir`. A compressed one is expanded into `scratch`.
    pub(super) fn open(
        dir: &Path,
        info: &ShardInfo,
        schema: Arc<Schema>,
        verify: Verify,
        scratch: &Path,
    ) -> Result<Self> {
        let path = dir.join(&info.stored().basename);
        let damaged = |reason: String| DataError::Damaged {
            shard: path.clone(),
            reason,
        };
        let file = MappedFile::open(&path).map_err(|e| damaged(e.to_string()))?;
        check_file(file.as_bytes(), info.stored(), verify).map_err(damaged)?;
        let data = match &info.compression {
            None => file,
            Some(name) => {
                let raw = expand(name, file.as_bytes(), info.raw_data.bytes).map_err(damaged)?;
                check_file(&raw, &info.raw_data, verify).map_err(damaged)?;
                let expanded = scratch.join(&info.raw_data.basename);
                write_whole(&expanded, &raw)?;
                MappedFile::open(&expanded).map_err(DataError::io("open", &expanded))?
            }
        };
        check_offsets(data.as_bytes(), info.samples).map_err(damaged)?;
        Ok(Self {
            path,
            schema,
            samples: info.samples,
            data,
        })
    }

    /// The stored bytes of sample `index` of this shard.
    fn sample_bytes(&self, index: usize) -> &[u8] {
        let data = self.data.as_bytes();
        &data[offset(data, index)..offset(data, index + 1)]
    }

    /// Sample `index` of this shard.
    pub(super) fn sample(&self, index: usize) -> Result<Sample> {
        if index >= self.samples {
            return Err(DataError::Order(format!(
                "sample {index} asked of {}, which has {}",
                self.path.display(),
                self.samples
            )));
        }
        let bytes = self.sample_bytes(index).to_vec();
        Sample::new(self.schema.clone(), bytes).map_err(|reason| self.damaged(index, &reason))
    }

    /// Bytes of every column of sample `index`, without copying the sample.
    pub(super) fn column_sizes(&self, index: usize) -> Result<Vec<usize>> {
        let ranges = self.schema.split(self.sample_bytes(index));
        let ranges = ranges.map_err(|reason| self.damaged(index, &reason))?;
        Ok(ranges.iter().map(ExactSizeIterator::len).collect())
    }

    fn damaged(&self, index: usize, reason: &str) -> DataError {
        DataError::Damaged {
            shard: self.path.clone(),
            reason: format!("sample {index}: {reason}"),
        }
    }
}

fn check_file(
    data: &[u8],
    info: &super::FileInfo,
    verify: Verify,
) -> std::result::Result<(), String> {
    if data.len() as u64 != info.bytes {
        return Err(format!(
            "{} bytes, its index says {}",
            data.len(),
            info.bytes
        ));
    }
    if verify == Verify::Hashes {
        for (name, expected) in &info.hashes {
            let hash = Hash::from_name(name).map_err(|e| e.to_string())?;
            let found = hash.digest(data);
            if found != *expected {
                return Err(format!("{name} is {found}, its index says {expected}"));
            }
        }
    }
    Ok(())
}

/// Expands a compressed shard, which may not become larger than the index says.
fn expand(name: &str, data: &[u8], bytes: u64) -> std::result::Result<Vec<u8>, String> {
    if name.split(':').next() != Some("zstd") {
        return Err(format!(
            "compressed with {name:?}; this program reads zstd and uncompressed shards"
        ));
    }
    let mut raw = Vec::new();
    zstd::stream::Decoder::new(data)
        .and_then(|decoder| decoder.take(bytes + 1).read_to_end(&mut raw))
        .map_err(|e| format!("cannot expand it: {e}"))?;
    Ok(raw)
}

fn word(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes) as usize)
}

fn offset(data: &[u8], index: usize) -> usize {
    word(data, 4 + 4 * index).unwrap_or(0)
}

/// Checks that a shard holds `samples` samples that lie one behind the other up to its end.
fn check_offsets(data: &[u8], samples: usize) -> std::result::Result<(), String> {
    let found = word(data, 0).ok_or("shorter than its head")?;
    if found != samples {
        return Err(format!("{found} samples, its index says {samples}"));
    }
    let head = samples
        .checked_add(2)
        .and_then(|words| words.checked_mul(4));
    let Some(head) = head.filter(|head| *head <= data.len()) else {
        return Err("shorter than its table of offsets".to_owned());
    };
    let mut last = head;
    for index in 0..=samples {
        let at = offset(data, index);
        if at < last || at > data.len() {
            return Err(format!(
                "offset {index} is {at}, outside of {last} to {}",
                data.len()
            ));
        }
        last = at;
    }
    match last == data.len() {
        true => Ok(()),
        false => Err(format!("its samples end at {last} of {} bytes", data.len())),
    }
}

/// A shard under construction, in memory.
#[derive(Debug, Default)]
pub(super) struct ShardBuilder {
    samples: Vec<Vec<u8>>,
    bytes: usize,
}

impl ShardBuilder {
    pub(super) fn len(&self) -> usize {
        self.samples.len()
    }

    /// Size of the file with one more sample of `next` bytes.
    pub(super) fn size_with(&self, next: usize, header: &[u8]) -> usize {
        8 + header.len() + self.bytes + next + 4
    }

    pub(super) fn push(&mut self, sample: Vec<u8>) {
        self.bytes += sample.len() + 4;
        self.samples.push(sample);
    }

    /// The shard's file. Leaves the builder empty.
    pub(super) fn take(&mut self, header: &[u8]) -> Vec<u8> {
        let samples = std::mem::take(self).samples;
        let mut at = 4 + 4 * (samples.len() + 1) + header.len();
        let mut file = Vec::with_capacity(at + samples.iter().map(Vec::len).sum::<usize>());
        // Sizes fit in 32 bits: `Writer` limits shards to below 4 GiB.
        file.extend((samples.len() as u32).to_le_bytes());
        file.extend((at as u32).to_le_bytes());
        for sample in &samples {
            at += sample.len();
            file.extend((at as u32).to_le_bytes());
        }
        file.extend(header);
        samples.iter().for_each(|sample| file.extend(sample));
        file
    }
}
