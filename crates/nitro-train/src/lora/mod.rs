//! Fine-tuning: low-rank adapters of a model, trained on a folder of pictures with captions.
//!
//! The loss is that of the first training (flow matching with logit-normal timesteps and caption
//! dropout); only the adapters learn. Latents are computed once and kept in the run's folder.

mod folder;

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::schedule::{Density, FlowMatchEuler};
use nitro_models::{Params, TensorMap};
use serde::{Deserialize, Serialize};

use self::folder::Pairs;
use crate::TrainError;
use crate::adapter::Adapter;
pub use crate::adapter::AdapterConfig;
use crate::config::{CommonConfig, RunConfig};
use crate::data::{noise_generator, shuffled};
use crate::frozen::{Frozen, Sampling};
use crate::losses::{flow_matching, velocity_tokens};
use crate::pictures::write_pictures;
use crate::trainer::{Losses, RunOptions, Task, train};

/// Adapters trained on a folder of pictures.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraTask {
    /// The model to adapt: a folder with `nitro.json`, or a repository of the Hub.
    pub model: String,
    /// Its variant.
    #[serde(default = "base")]
    pub variant: String,
    /// Pictures (`.png`, `.jpg`, `.webp`), each with its caption in a `.txt` file of the same name.
    pub data: PathBuf,
    /// Put before every caption, so that the adapter answers to it.
    #[serde(default)]
    pub trigger: String,
    /// The adapters.
    pub lora: AdapterConfig,
    /// Probability of training on an empty caption.
    pub caption_dropout: f64,
    /// Mean of the logit-normal timestep density.
    #[serde(default)]
    pub logit_mean: f64,
    /// Standard deviation of it.
    #[serde(default = "one")]
    pub logit_std: f64,
    /// Prompts of the sample pictures; the first captions of the folder if there are none.
    #[serde(default)]
    pub sample_prompts: Vec<String>,
}

fn base() -> String {
    "base".into()
}

fn one() -> f64 {
    1.0
}

/// Runs `task` in `dir`, from its newest checkpoint if there is one, and writes the averaged adapter
/// into the folder `export`.
pub fn run(
    config: &RunConfig,
    task: &LoraTask,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let frozen = Frozen::open(
        &task.model,
        Some(&task.variant),
        config.run.precision.into(),
    )?;
    let pairs = Pairs::open(
        &task.data,
        &task.trigger,
        &frozen,
        &dir.join("latents.safetensors"),
    )?;
    let training = LoraTraining {
        adapter: Adapter::new(&task.lora, &frozen.parameters)?,
        run: &config.run,
        frozen,
        pairs,
        task,
    };
    let store = train(&training, config, dir, options)?;
    if options.comm.rank() != 0 {
        return Ok(());
    }
    let base = format!("{} ({})", task.model, task.variant);
    training.adapter.export(&store, export, &base)
}

struct LoraTraining<'a> {
    frozen: Frozen,
    pairs: Pairs,
    adapter: Adapter,
    run: &'a CommonConfig,
    task: &'a LoraTask,
}

/// Examples of one step.
struct Batch {
    noisy: Vec<f32>,  // [count, c, h, w]
    target: Vec<f32>, // likewise: the velocity
    captions: Vec<String>,
    timesteps: Vec<f32>,
}

impl Task for LoraTraining<'_> {
    type Batch = Batch;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        self.adapter.build(p).map(drop)
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Batch, TrainError> {
        let density = Density::LogitNormal {
            mean: self.task.logit_mean,
            std: self.task.logit_std,
        };
        let schedule = FlowMatchEuler::nitro_e();
        let mut batch = Batch {
            noisy: Vec::new(),
            target: Vec::new(),
            captions: Vec::new(),
            timesteps: Vec::new(),
        };
        for example in examples {
            let place = step * self.run.batch_size as u64 + example as u64;
            let index = shuffled(self.run.seed, place, self.pairs.latents.len());
            let latent = &self.pairs.latents[index];
            let mut rng = noise_generator(self.run.seed, step, example);
            let u = density.sample(1, &mut rng)[0];
            let level = schedule.level(u);
            let keep = f64::from(rng.rand(1)[0]) >= self.task.caption_dropout;
            batch.captions.push(match keep {
                true => self.pairs.captions[index].clone(),
                false => String::new(),
            });
            batch.timesteps.push(level.timestep);
            for (z, n) in latent.iter().zip(rng.randn(latent.len())) {
                batch.noisy.push((1.0 - level.sigma) * z + level.sigma * n);
                batch.target.push(n - z);
            }
        }
        Ok(batch)
    }

    fn loss(&self, p: &Params<'_>, batch: Batch) -> Result<Losses, TrainError> {
        let [c, h, w] = self.frozen.latent_shape();
        let shape = [batch.timesteps.len(), c, h, w];
        let device = Device::flex();
        let latent =
            |values: Vec<f32>| Tensor::<4>::from_data(TensorData::new(values, shape), &device);
        let captions: Vec<&str> = batch.captions.iter().map(String::as_str).collect();
        let text = self.frozen.text(&captions)?;
        let model = self.frozen.adapted_tracked(&self.adapter.build(p)?)?;
        let output = model.forward_train(latent(batch.noisy), text, &batch.timesteps)?;
        let target = velocity_tokens(latent(batch.target), self.frozen.config.patch_size);
        Ok(Losses {
            total: flow_matching(output.tokens, target),
            parts: Vec::new(),
        })
    }

    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError> {
        let params = Params::new(averaged, &Device::flex(), self.run.precision.into());
        let model = self.frozen.adapted(&self.adapter.build(&params)?)?;
        let mut prompts: Vec<&str> = self
            .task
            .sample_prompts
            .iter()
            .map(String::as_str)
            .collect();
        if prompts.is_empty() {
            prompts = self
                .pairs
                .captions
                .iter()
                .take(8)
                .map(String::as_str)
                .collect();
        }
        let variant = self.frozen.pipeline.variant();
        let how = Sampling {
            steps: variant.steps,
            guidance: variant.guidance as f32,
            batch: 8,
        };
        let seeds: Vec<u64> = (0..prompts.len() as u64).collect();
        let latents = self.frozen.sample(&model, &prompts, &seeds, how)?;
        let pictures = self.frozen.decode(&latents)?;
        let path = dir.join(format!("step-{step:08}.png"));
        write_pictures(&path, &pictures.iter().collect::<Vec<_>>(), 4)?;
        Ok(Some(path))
    }
}
