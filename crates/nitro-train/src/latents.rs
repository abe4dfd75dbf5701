//! Cached training pairs: latents of rendered pictures, with their captions.
//!
//! A folder of shards `shard-00000.safetensors`, each with `latents [n, c, h, w]` (`f16`, multiplied
//! by the autoencoder's scaling factor) and, in its metadata, the captions as a JSON list and the
//! seed. Shard `i` is a function of the seed and `i`, so a run that was killed goes on with the
//! shards that are missing, and a picture is rendered again where it is needed (REPA's teacher).

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use indicatif::ProgressBar;
use nitro_data::shapes::{Example, render};
use nitro_models::dcae::{DcaeConfig, Encoder};
use nitro_models::{DType, Params, WeightFiles, save_safetensors};
use nitro_ops::Precision;
use rayon::prelude::*;

use crate::TrainError;
use crate::data::example_seed;
use crate::pictures::from_bytes;

/// Pairs in one shard.
pub const SHARD: usize = 2048;
const BATCH: usize = 32;

/// Renders the pairs of these shards from `seed`, encodes them with the autoencoder in
/// `frozen/dc-ae`, and writes the shards that are missing in `out`.
pub fn precompute(
    frozen: &Path,
    out: &Path,
    seed: u64,
    shards: Range<usize>,
    side: usize,
    precision: Precision,
    bar: &ProgressBar,
) -> Result<(), TrainError> {
    let dir = frozen.join("dc-ae");
    let config = read_config::<DcaeConfig>(&dir.join("config.json"))?;
    let files = WeightFiles::open(dir.join("diffusion_pytorch_model.safetensors"))?;
    let params = Params::new(&files, &Device::flex(), precision).for_inference();
    let encoder = Encoder::new(&config, &params)?;
    std::fs::create_dir_all(out).map_err(|source| TrainError::Io {
        path: out.to_owned(),
        source,
    })?;
    bar.set_length((shards.len() * SHARD) as u64);
    for index in shards {
        let path = shard_path(out, index);
        if path.exists() {
            bar.inc(SHARD as u64);
            continue;
        }
        let (mut latents, mut captions, mut shape) = (Vec::new(), Vec::new(), [0; 4]);
        for batch in 0..SHARD / BATCH {
            let pairs: Vec<(Vec<f32>, String)> = (0..BATCH)
                .into_par_iter()
                .map(|i| {
                    let seed = example_seed(seed, index as u64, batch * BATCH + i);
                    let example = Example::from_seed(seed);
                    let picture = render(&example.scene, side);
                    (from_bytes(&picture, side, (0, 0), side), example.caption)
                })
                .collect();
            let (pixels, words): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let data = TensorData::new(pixels.concat(), [BATCH, 3, side, side]);
            let latent =
                encoder.encode(Tensor::from_data(data, &Device::flex()))? * config.scaling_factor;
            let [_, c, h, w] = latent.dims();
            shape = [SHARD, c, h, w];
            latents.extend(latent.into_data().try_into_vec::<f32>().unwrap_or_default());
            captions.extend(words);
            bar.inc(BATCH as u64);
        }
        let text = serde_json::to_string(&captions).unwrap_or_default();
        let metadata = HashMap::from([
            ("captions".to_owned(), text),
            ("seed".to_owned(), seed.to_string()),
        ]);
        let tensors = [("latents".to_owned(), shape.to_vec(), latents.as_slice())];
        save_safetensors(&path, &tensors, &metadata, DType::F16)?;
    }
    Ok(())
}

/// All pairs of a folder written by [`precompute`].
#[derive(Debug)]
pub struct Latents {
    /// Channels, height and width of a latent.
    pub shape: [usize; 3],
    values: Vec<half::f16>,
    captions: Vec<String>,
    /// Seed of each shard, and the index of its first pair.
    shards: Vec<(u64, usize)>,
}

impl Latents {
    /// Reads all shards of `dir`.
    pub fn open(dir: &Path) -> Result<Self, TrainError> {
        let wrong = |reason: &str| TrainError::Config {
            origin: dir.display().to_string(),
            reason: format!("{reason}; write it again with `nitro train latents`"),
        };
        let mut all = Self {
            shape: [0; 3],
            values: Vec::new(),
            captions: Vec::new(),
            shards: Vec::new(),
        };
        for index in 0.. {
            let path = shard_path(dir, index);
            if !path.exists() {
                break;
            }
            let files = WeightFiles::open(&path)?;
            let (shape, values) = files.read("latents")?;
            let &[_, c, h, w] = shape.as_slice() else {
                return Err(wrong("latents are not of rank 4"));
            };
            if index > 0 && all.shape != [c, h, w] {
                return Err(wrong("the shards' latents differ in shape"));
            }
            all.shape = [c, h, w];
            let seed = files.metadata().get("seed").map_or("0", String::as_str);
            let seed = seed.parse().map_err(|_| wrong("a seed is not a number"))?;
            all.shards.push((seed, all.captions.len()));
            all.values
                .extend(values.into_iter().map(half::f16::from_f32));
            let captions = files
                .metadata()
                .get("captions")
                .map(String::as_str)
                .unwrap_or("[]");
            let captions: Vec<String> =
                serde_json::from_str(captions).map_err(|_| wrong("captions are not a list"))?;
            all.captions.extend(captions);
        }
        if all.captions.is_empty() {
            return Err(wrong("no shards are there"));
        }
        if all.captions.len() * all.size() != all.values.len() {
            return Err(wrong("captions and latents differ in number"));
        }
        Ok(all)
    }

    /// A checksum of all latents and captions.
    pub fn checksum(&self) -> u32 {
        let start = crc32c::crc32c(bytemuck::cast_slice(&self.values));
        self.captions.iter().fold(start, |sum, caption| {
            crc32c::crc32c_append(sum, caption.as_bytes())
        })
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Whether there are none (never, once opened).
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty()
    }

    fn size(&self) -> usize {
        self.shape.iter().product()
    }

    /// The seed from which the picture of pair `index` was rendered ([`Example::from_seed`]).
    pub fn seed(&self, index: usize) -> u64 {
        let shard = self.shards.partition_point(|(_, first)| *first <= index) - 1;
        let (seed, first) = self.shards[shard];
        example_seed(seed, shard as u64, index - first)
    }

    /// Fails unless the pictures rendered from [`seed`](Self::seed) are those the latents are of, as
    /// far as captions tell.
    pub fn check_seeds(&self) -> Result<(), TrainError> {
        for (_, first) in &self.shards {
            let rendered = Example::from_seed(self.seed(*first)).caption;
            let stored = &self.captions[*first];
            if rendered != *stored {
                return Err(TrainError::Config {
                    origin: "the cached latents".into(),
                    reason: format!(
                        "their pictures cannot be rendered again for REPA: pair {first} says \
                         \"{stored}\", its seed gives \"{rendered}\"; write them again with \
                         `nitro train latents`"
                    ),
                });
            }
        }
        Ok(())
    }

    /// Latent and caption of pair `index`.
    pub fn pair(&self, index: usize) -> (&[half::f16], &str) {
        let size = self.size();
        (
            &self.values[index * size..(index + 1) * size],
            &self.captions[index],
        )
    }
}

/// Reads a JSON configuration.
pub(crate) fn read_config<C: serde::de::DeserializeOwned>(path: &Path) -> Result<C, TrainError> {
    let text = std::fs::read_to_string(path).map_err(|source| TrainError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|e| TrainError::Config {
        origin: path.display().to_string(),
        reason: e.to_string(),
    })
}

fn shard_path(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("shard-{index:05}.safetensors"))
}
