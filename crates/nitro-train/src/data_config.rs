//! Where an E-MMDiT's training examples come from, as a configuration says it.

use std::path::PathBuf;

use nitro_data::mds::order::{DEFAULT_SEED, Sampling, Streams, Weight};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::TrainError;

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
    /// Dataset folders, read as one list of samples; each may have a weight.
    pub datasets: Vec<StreamConfig>,
    /// Samples of an epoch, for folders weighted by `proportion` or not at all.
    #[serde(default)]
    pub epoch_size: Option<usize>,
    /// Whether epochs that do not take all samples of a folder take others each time.
    #[serde(default)]
    pub sampling_method: Sampling,
    /// Samples taken together from one shard where not all are taken.
    #[serde(default = "one")]
    pub sampling_granularity: usize,
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

/// A dataset folder: its path alone, or `{path: FOLDER, repeat: 2}` with one of StreamingDataset's
/// weights.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum StreamConfig {
    /// The folder; an epoch has each of its samples once.
    Folder(PathBuf),
    /// The folder, and how often an epoch has its samples.
    Weighted(WeightedStream),
}

/// A dataset folder with a weight.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedStream {
    /// The folder.
    pub path: PathBuf,
    /// Its share of an epoch, relative to the other folders', which then need one too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proportion: Option<f64>,
    /// How often an epoch has each of its samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat: Option<f64>,
    /// How many samples an epoch has of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choose: Option<usize>,
}

impl<'de> Deserialize<'de> for StreamConfig {
    /// By hand, so that an error says what is wrong with the weight.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Value::deserialize(from)? {
            Value::String(folder) => Ok(Self::Folder(folder.into())),
            value => serde_json::from_value(value)
                .map(Self::Weighted)
                .map_err(|e| D::Error::custom(format!("datasets: {e}"))),
        }
    }
}

impl MdsData {
    /// The dataset folders.
    pub fn folders(&self) -> Vec<PathBuf> {
        let path = |stream: &StreamConfig| match stream {
            StreamConfig::Folder(path) => path.clone(),
            StreamConfig::Weighted(stream) => stream.path.clone(),
        };
        self.datasets.iter().map(path).collect()
    }

    /// How the folders make up an epoch.
    ///
    /// # Errors
    /// A folder with two weights.
    pub fn streams(&self) -> Result<Streams, TrainError> {
        let weight = |stream: &StreamConfig| {
            let StreamConfig::Weighted(stream) = stream else {
                return Ok(None);
            };
            let given = [
                stream.proportion.map(Weight::Proportion),
                stream.repeat.map(Weight::Repeat),
                stream.choose.map(Weight::Choose),
            ];
            let mut given = given.into_iter().flatten();
            match (given.next(), given.next()) {
                (weight, None) => Ok(weight),
                _ => Err(TrainError::Config {
                    origin: format!("data.datasets: {}", stream.path.display()),
                    reason: "has several weights; give one of proportion, repeat and choose".into(),
                }),
            }
        };
        Ok(Streams {
            weights: self.datasets.iter().map(weight).collect::<Result<_, _>>()?,
            epoch_size: self.epoch_size,
            sampling: self.sampling_method,
            granularity: self.sampling_granularity,
        })
    }
}

fn one() -> usize {
    1
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
