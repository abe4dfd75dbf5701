//! Where an E-MMDiT's training examples come from, as a configuration says it.

use std::path::PathBuf;

use nitro_data::mds::order::DEFAULT_SEED;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Where an E-MMDiT's training examples come from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum DataConfig {
    /// Pairs of the shapes world cached by `nitro train latents`.
    Latents {
        /// Their folder.
        folder: PathBuf,
    },
    /// MDS shards with the official pipeline's columns, as `nitro data precompute` and the official
    /// `precompute.py` write them.
    Mds(MdsData),
}

/// Shards to train on. Keys that the official configuration has are named as there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MdsData {
    /// Dataset folders, read as one list of samples.
    pub datasets: Vec<PathBuf>,
    /// Column of the latents; the only one called `latents_*` if not given.
    #[serde(default)]
    pub latents: Option<String>,
    /// What latents are multiplied by; the frozen autoencoder's factor if not given.
    #[serde(default)]
    pub scaling_factor: Option<f64>,
    /// Reads text states from the column `text_feat`; else captions are encoded as they come.
    #[serde(default)]
    pub precompute_txt_emb: bool,
    /// Reads REPA's targets from the column `dino_feat`; else pictures (`jpg`) are encoded as they
    /// come.
    #[serde(default)]
    pub precompute_dino_feat: bool,
    /// File with the text states of the empty prompt, for precomputed text states. If not given,
    /// `null_emb.safetensors` of the first dataset that has one, else the frozen text encoder's.
    #[serde(default)]
    pub null_emb_path: Option<PathBuf>,
    /// Seed of the order of samples (`StreamingDataset`'s `shuffle_seed`).
    #[serde(default = "default_seed")]
    pub shuffle_seed: u64,
    /// Threads that read and decode samples.
    #[serde(default = "default_workers")]
    pub num_workers: usize,
    /// Puts another sample in the place of a damaged one, and counts; else damage ends the run.
    #[serde(default)]
    pub skip_damaged: bool,
    /// Checks all hashes that the indexes have when a shard is first read.
    #[serde(default)]
    pub verify: bool,
}

fn default_seed() -> u64 {
    DEFAULT_SEED
}

fn default_workers() -> usize {
    2
}

/// Reads a [`DataConfig`], or the folder alone that stood there once.
pub(crate) fn read<'de, D: Deserializer<'de>>(from: D) -> Result<DataConfig, D::Error> {
    match Value::deserialize(from)? {
        Value::String(folder) => Ok(DataConfig::Latents {
            folder: folder.into(),
        }),
        value => serde_json::from_value(value).map_err(|e| D::Error::custom(format!("data: {e}"))),
    }
}
