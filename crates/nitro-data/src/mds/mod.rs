//! The MDS format of mosaicml-streaming, version 2.
//!
//! A dataset is a folder with `index.json` and shards. A shard is, little endian:
//! `u32 samples`, `u32 offsets[samples + 1]` from the beginning of the file, the writer's
//! configuration as JSON, the samples. A sample is one `u32` size per column of variable size, then
//! the columns' bytes, both in column order (names sorted). A shard may be compressed as a whole.
//!
//! [`Dataset`] reads one or several folders as one list of samples, [`Writer`] writes a folder,
//! [`merge_index`] joins folders, [`order`] says which sample comes when.

mod dataset;
mod dtype;
mod encoding;
mod hash;
mod index;
pub mod order;
mod sample;
mod shard;
mod value;
mod writer;

pub use dataset::{Damage, Dataset, DatasetOptions, OnDamage, Verify};
pub use dtype::Dtype;
pub use encoding::Encoding;
pub use hash::Hash;
pub use index::{FileInfo, INDEX, Index, ShardInfo, merge_index};
pub use sample::{Column, Sample, Schema};
pub use value::{Array, Pixels, Scalar, Value};
pub use writer::{Compression, Writer, WriterOptions};
