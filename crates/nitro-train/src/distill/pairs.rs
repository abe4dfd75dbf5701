//! The teacher's pictures: what the student learns from instead of data.
//!
//! A folder of shards `pairs-00000.safetensors`, each with the clean latents (`f16`) and in its
//! metadata the prompts, the seeds of the noise they came from, and what made them. Noise is drawn
//! again from its seed, which is exact. Shard `i` is a function of the run's seed and `i`: a run that
//! was killed goes on with the shards that are missing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::f16;
use indicatif::ProgressBar;
use nitro_diffusion::noise::NoiseKind;
use nitro_models::{DType, WeightFiles, save_safetensors};

use super::config::PairsConfig;
use crate::TrainError;
use crate::data::example_seed;
use crate::frozen::{Frozen, Sampling};
use crate::prompts::Prompts;

/// Metadata keys of a shard.
const PROMPTS: &str = "nitro.prompts";
const SEEDS: &str = "nitro.seeds";
const TEACHER: &str = "nitro.teacher";

/// All pairs.
#[derive(Debug)]
pub(crate) struct Pairs {
    latents: Vec<f16>,
    prompts: Vec<String>,
    seeds: Vec<u64>,
    each: usize,
}

/// One pair.
pub(crate) struct Pair<'a> {
    pub(crate) clean: Vec<f32>,
    pub(crate) noise: Vec<f32>,
    pub(crate) prompt: &'a str,
}

/// What pairs are made of; another answer makes other pairs.
fn teacher(config: &PairsConfig, frozen: &Frozen, seed: u64) -> Result<String, TrainError> {
    Ok(format!(
        "{} steps {} guidance {} seed {seed}",
        frozen.pipeline.fingerprint()?,
        config.steps,
        config.guidance
    ))
}

/// Paints the shards that are missing. `stop` is asked between batches.
pub(crate) fn synthesize(
    config: &PairsConfig,
    frozen: &Frozen,
    prompts: &Prompts,
    seed: u64,
    bar: &ProgressBar,
    stop: &dyn Fn() -> bool,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(&config.folder).map_err(|source| TrainError::Io {
        path: config.folder.clone(),
        source,
    })?;
    let teacher = teacher(config, frozen, seed)?;
    let how = Sampling {
        steps: config.steps,
        guidance: config.guidance,
        batch: config.batch,
    };
    let each = frozen.latent_len();
    for index in 0..config.shards {
        let path = shard(&config.folder, index);
        if path.exists() {
            bar.inc(config.shard_size as u64);
            continue;
        }
        let first = (index * config.shard_size) as u64;
        let texts: Vec<String> = (0..config.shard_size as u64)
            .map(|i| prompts.get(seed, first + i).prompt)
            .collect();
        // A torch-compatible generator keeps the low 32 bits of its seed.
        let seeds: Vec<u64> = (0..config.shard_size)
            .map(|i| example_seed(seed ^ 0x70_6169_7273, index as u64, i) & 0xFFFF_FFFF)
            .collect();
        let mut latents = Vec::with_capacity(config.shard_size * each);
        for (texts, seeds) in texts.chunks(config.batch).zip(seeds.chunks(config.batch)) {
            if stop() {
                return Err(TrainError::Interrupted { step: 0 });
            }
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let model = frozen.pipeline.transformer();
            latents.extend(frozen.sample(model, &texts, seeds, how)?);
            bar.inc(texts.len() as u64);
        }
        let [c, h, w] = frozen.latent_shape();
        let shape = vec![config.shard_size, c, h, w];
        let metadata = HashMap::from([
            (PROMPTS.to_owned(), serde_json::json!(texts).to_string()),
            (SEEDS.to_owned(), serde_json::json!(seeds).to_string()),
            (TEACHER.to_owned(), teacher.clone()),
        ]);
        let tensors = [("latents".to_owned(), shape, latents.as_slice())];
        save_safetensors(&path, &tensors, &metadata, DType::F16)?;
    }
    Ok(())
}

impl Pairs {
    /// Reads the shards that `config` asks for.
    pub(crate) fn open(
        config: &PairsConfig,
        frozen: &Frozen,
        seed: u64,
    ) -> Result<Self, TrainError> {
        let teacher = teacher(config, frozen, seed)?;
        let mut pairs = Self {
            latents: Vec::new(),
            prompts: Vec::new(),
            seeds: Vec::new(),
            each: frozen.latent_len(),
        };
        for index in 0..config.shards {
            let path = shard(&config.folder, index);
            let wrong = |reason: String| TrainError::Data {
                path: path.clone(),
                reason: format!("{reason}; remove the shard to have it painted again"),
            };
            let files = WeightFiles::open(&path)?;
            let field = |key: &str| files.metadata().get(key).cloned().unwrap_or_default();
            if field(TEACHER) != teacher {
                return Err(wrong(
                    "its pictures are of another teacher, number of steps, guidance or seed".into(),
                ));
            }
            let (_, latents) = files.read("latents")?;
            let prompts: Vec<String> = serde_json::from_str(&field(PROMPTS))
                .map_err(|e| wrong(format!("its prompts are no list: {e}")))?;
            let seeds: Vec<u64> = serde_json::from_str(&field(SEEDS))
                .map_err(|e| wrong(format!("its seeds are no list: {e}")))?;
            if prompts.len() != seeds.len() || latents.len() != seeds.len() * pairs.each {
                return Err(wrong("latents, prompts and seeds differ in number".into()));
            }
            pairs.latents.extend(latents.into_iter().map(f16::from_f32));
            pairs.prompts.extend(prompts);
            pairs.seeds.extend(seeds);
        }
        Ok(pairs)
    }

    pub(crate) fn len(&self) -> usize {
        self.seeds.len()
    }

    pub(crate) fn get(&self, index: usize) -> Pair<'_> {
        let clean = &self.latents[index * self.each..(index + 1) * self.each];
        Pair {
            clean: clean.iter().map(|x| x.to_f32()).collect(),
            noise: NoiseKind::TorchCpu.shared(self.seeds[index], self.each),
            prompt: &self.prompts[index],
        }
    }
}

fn shard(folder: &Path, index: usize) -> PathBuf {
    folder.join(format!("pairs-{index:05}.safetensors"))
}
