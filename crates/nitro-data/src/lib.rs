//! Data: MDS shards, from raw sets to training batches; and the shapes world.
//!
//! This crate knows no model: it deals in pictures (RGB bytes), captions, columns and verdicts.
//!
//! - [`mds`]: the format of mosaicml-streaming, its reader, writer and order of samples.
//! - [`loader`]: batches for training, prefetched, in a reproducible order that can be resumed.
//! - [`image`]: torchvision's resize and crop on 8-bit pictures, JPEG in and out.
//! - [`batches`]: the same order by number, for trainers whose steps are functions of their number.
//! - [`ingest`]: raw image-text sets to shards.
//! - [`job`]: long writing jobs that survive a kill.
//! - [`shapes`]: scenes, renderer, captions and exact judge of the synthetic world.

pub mod batches;
mod files;
pub mod image;
pub mod ingest;
pub mod job;
pub mod loader;
pub mod mds;
pub mod python_json;
pub mod shapes;

mod error;
pub use error::{DataError, Result};
