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
use nitro_eval::geneval::Metadata;
use nitro_models::{DType, WeightFiles, save_safetensors};

use super::config::{PairsConfig, Selection};
use crate::TrainError;
use crate::data::example_seed;
use crate::frozen::{Frozen, Sampling};
use crate::prompts::Prompts;
use crate::rewards::{Rewards, Sample};

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
    let mut teacher = format!(
        "{} steps {} guidance {} seed {seed}",
        frozen.pipeline.fingerprint()?,
        config.steps,
        config.guidance
    );
    if let Some(Selection { attempts, reward }) = config.select {
        teacher += &format!(" attempts {attempts} reward {reward}");
    }
    Ok(teacher)
}

/// What shards are painted with.
pub(crate) struct Studio<'a> {
    pub(crate) config: &'a PairsConfig,
    pub(crate) frozen: &'a Frozen,
    pub(crate) prompts: &'a Prompts,
    /// What [`Selection`] goes by.
    pub(crate) rewards: &'a Rewards,
    pub(crate) seed: u64,
    pub(crate) bar: &'a ProgressBar,
    /// Asked between batches.
    pub(crate) stop: &'a dyn Fn() -> bool,
}

impl Studio<'_> {
    /// Paints the shards that are missing.
    pub(crate) fn synthesize(&self) -> Result<(), TrainError> {
        let config = self.config;
        std::fs::create_dir_all(&config.folder).map_err(|source| TrainError::Io {
            path: config.folder.clone(),
            source,
        })?;
        let teacher = teacher(config, self.frozen, self.seed)?;
        for index in 0..config.shards {
            let path = shard(&config.folder, index);
            if path.exists() {
                self.bar.inc(config.shard_size as u64);
                continue;
            }
            let size = config.shard_size;
            let prompts: Vec<Metadata> = (0..size)
                .map(|i| self.prompts.get(self.seed, (index * size + i) as u64))
                .collect();
            let painted = self.paint_all(index, &prompts)?;
            let texts: Vec<&str> = prompts.iter().map(|p| p.prompt.as_str()).collect();
            let seeds: Vec<u64> = painted.iter().map(|(seed, _)| *seed).collect();
            let metadata = HashMap::from([
                (PROMPTS.to_owned(), serde_json::json!(texts).to_string()),
                (SEEDS.to_owned(), serde_json::json!(seeds).to_string()),
                (TEACHER.to_owned(), teacher.clone()),
            ]);
            let latents: Vec<f32> = painted.into_iter().flat_map(|(_, x)| x).collect();
            let [c, h, w] = self.frozen.latent_shape();
            let shape = vec![config.shard_size, c, h, w];
            let tensors = [("latents".to_owned(), shape, latents.as_slice())];
            save_safetensors(&path, &tensors, &metadata, DType::F16)?;
        }
        Ok(())
    }

    /// The noise's seed and the latents of each pair of shard `index`.
    fn paint_all(
        &self,
        index: usize,
        prompts: &[Metadata],
    ) -> Result<Vec<(u64, Vec<f32>)>, TrainError> {
        let (config, frozen) = (self.config, self.frozen);
        let how = Sampling {
            steps: config.steps,
            guidance: config.guidance,
            batch: config.batch,
        };
        let selection = config.select.unwrap_or(ONCE);
        let settled = |pairs: usize| self.bar.inc(pairs as u64);
        best_of(
            selection,
            prompts.len(),
            config.batch,
            settled,
            |attempt, some| {
                if (self.stop)() {
                    return Err(TrainError::Interrupted { step: 0 });
                }
                // A torch-compatible generator keeps the low 32 bits of its seed.
                let seed = |i: &usize| {
                    let place = attempt * config.shard_size + i;
                    example_seed(self.seed ^ 0x70_6169_7273, index as u64, place) & 0xFFFF_FFFF
                };
                let seeds: Vec<u64> = some.iter().map(seed).collect();
                let texts: Vec<&str> = some.iter().map(|i| prompts[*i].prompt.as_str()).collect();
                let latents = frozen.sample(frozen.pipeline.transformer(), &texts, &seeds, how)?;
                let rewards = match config.select {
                    None => vec![0.0; some.len()],
                    Some(_) => {
                        let pictures = frozen.decode(&latents)?;
                        let samples = some.iter().zip(&pictures).map(|(i, picture)| Sample {
                            metadata: &prompts[*i],
                            picture,
                        });
                        self.rewards.score(&samples.collect::<Vec<_>>())?.total
                    }
                };
                let latents = latents.chunks(frozen.latent_len()).map(<[f32]>::to_vec);
                Ok(rewards
                    .into_iter()
                    .zip(seeds.into_iter().zip(latents))
                    .collect())
            },
        )
    }
}

/// One picture of each prompt.
const ONCE: Selection = Selection {
    attempts: 1,
    reward: f64::NEG_INFINITY,
};

/// `count` things, each the best of as many attempts as it takes to reach the reward. `make` makes
/// some, by number, with their rewards; `settled` hears how many more are done.
fn best_of<T>(
    selection: Selection,
    count: usize,
    batch: usize,
    settled: impl Fn(usize),
    mut make: impl FnMut(usize, &[usize]) -> Result<Vec<(f64, T)>, TrainError>,
) -> Result<Vec<T>, TrainError> {
    let mut best: Vec<Option<(f64, T)>> = (0..count).map(|_| None).collect();
    let enough = |reward: f64| reward >= selection.reward;
    for attempt in 0..selection.attempts {
        let last = attempt + 1 == selection.attempts;
        let wanting: Vec<usize> = (0..count)
            .filter(|i| best[*i].as_ref().is_none_or(|(reward, _)| !enough(*reward)))
            .collect();
        for some in wanting.chunks(batch) {
            let made = make(attempt, some)?;
            settled(
                made.iter()
                    .filter(|(reward, _)| last || enough(*reward))
                    .count(),
            );
            for (i, made) in some.iter().zip(made) {
                match &best[*i] {
                    Some((reward, _)) if *reward >= made.0 => {}
                    _ => best[*i] = Some(made),
                }
            }
        }
    }
    Ok(best.into_iter().flatten().map(|(_, thing)| thing).collect())
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
                    "its pictures are of another teacher, number of steps, guidance, selection or seed".into(),
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_best_of_several_attempts_is_kept_and_no_more_are_made_than_needed() {
        // Rewards by attempt: the first thing is good at once, the second in the end, the third never.
        let rewards = [[1.0, 0.0, 0.3], [9.0, 0.5, 0.2], [9.0, 1.0, 0.3]];
        let selection = Selection {
            attempts: 3,
            reward: 1.0,
        };
        let (settled, mut asked) = (Cell::new(0), Vec::new());
        let kept = best_of(
            selection,
            3,
            2,
            |n| settled.set(settled.get() + n),
            |attempt, some| {
                asked.push((attempt, some.to_vec()));
                let make = |i: &usize| (rewards[attempt][*i], (attempt, *i));
                Ok(some.iter().map(make).collect())
            },
        );
        assert_eq!(kept.unwrap(), [(0, 0), (2, 1), (0, 2)]);
        assert_eq!(settled.get(), 3);
        assert_eq!(
            asked,
            [
                (0, vec![0, 1]),
                (0, vec![2]),
                (1, vec![1, 2]),
                (2, vec![1, 2])
            ]
        );
    }
}
