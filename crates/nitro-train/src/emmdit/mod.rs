//! Training the E-MMDiT: flow matching on cached latents with captions.
//!
//! Per example: `u` is logit-normal and chooses a timestep and its sigma, `x = (1 - sigma) z +
//! sigma noise`, and the model is to give `noise - z`; a caption is replaced by the empty one with
//! some probability, which is what classifier-free guidance needs. With REPA, the first group's image
//! tokens are projected and aligned with a frozen DINOv2's patch features of the clean picture.
//! Source: the official `train.py`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::guidance;
use nitro_diffusion::noise::NoiseKind;
use nitro_diffusion::sampler::Euler;
use nitro_diffusion::schedule::{Density, FlowMatchEuler};
use nitro_eval::shapes::{score_image, shapes_bench};
use nitro_models::dcae::{DcaeConfig, Decoder};
use nitro_models::emmdit::Emmdit;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{Params, TensorMap, WeightFiles};
use nitro_ops::Precision;
use tokenizers::Tokenizer;

use crate::TrainError;
use crate::config::{CommonConfig, EmmditTask};
use crate::data::{noise_generator, shuffled};
use crate::language_model::encode_all;
use crate::latents::{Latents, read_config};
use crate::losses::{alignment, flow_matching, velocity_tokens};
use crate::pictures::{sample_path, to_bytes, write_grid};
use crate::recompute::{self, Inputs};
use crate::repa::Teacher;
use crate::store::ParameterStore;
use crate::trainer::{Losses, Measured, Task, whole_gradients};

/// Prompts of the sample grids: one or two of each kind of task.
const PROMPTS: [&str; 16] = [
    "a circle",
    "a star",
    "a red heart",
    "a blue ring",
    "a green triangle",
    "a circle and a star",
    "a cross and a crescent",
    "two squares",
    "three hearts",
    "four rings",
    "a circle left of a square",
    "a star above a ring",
    "a heart below a cross",
    "a red circle and a blue square",
    "a yellow star and a purple ring",
    "a red circle left of a blue square",
];
/// Pictures made at once for a score.
const TOGETHER: usize = 20;
/// Sampling steps of the samples, and of the model when nothing else is asked for.
pub(crate) const STEPS: usize = 20;
/// Guidance scale, likewise.
pub(crate) const GUIDANCE: f32 = 4.5;

/// An E-MMDiT, its data, and the frozen parts around it.
pub struct EmmditTraining<'a> {
    common: &'a CommonConfig,
    task: &'a EmmditTask,
    latents: Latents,
    schedule: FlowMatchEuler,
    tokenizer: Tokenizer,
    text_encoder: Llama,
    decoder: Decoder,
    scaling_factor: f64,
    empty_text: Tensor<3>,
    teacher: Option<Teacher>,
}

/// Examples of one step.
pub struct Pairs {
    noisy: Vec<f32>,  // [count, c, h, w]
    target: Vec<f32>, // likewise: the velocity
    captions: Vec<String>,
    timesteps: Vec<f32>,
    pictures: Vec<f32>, // what the REPA teacher looks at, if there is one
}

impl<'a> EmmditTraining<'a> {
    /// Opens the data and the frozen models that `task` names.
    pub fn new(common: &'a CommonConfig, task: &'a EmmditTask) -> Result<Self, TrainError> {
        let latents = Latents::open(&task.latents)?;
        let config = &task.model;
        let expected = [config.in_channels, config.sample_size, config.sample_size];
        if latents.shape != expected {
            return Err(TrainError::Config {
                origin: task.latents.display().to_string(),
                reason: format!(
                    "latents are {:?}, the model takes {expected:?}",
                    latents.shape
                ),
            });
        }
        let device = Device::flex();
        let precision = Precision::from(common.precision);
        let dir = task.frozen.join("text_encoder");
        let llama: LlamaConfig = read_config(&dir.join("config.json"))?;
        let files = WeightFiles::open(dir.join("model.safetensors"))?;
        let params = Params::new(&files, &device, precision).for_inference();
        let text_encoder = Llama::new(&llama, &params)?;
        let tokenizer = crate::tokenizer::load(&dir)?;
        let dir = task.frozen.join("dc-ae");
        let dcae: DcaeConfig = read_config(&dir.join("config.json"))?;
        let files = WeightFiles::open(dir.join("diffusion_pytorch_model.safetensors"))?;
        let params = Params::new(&files, &device, precision).for_inference();
        let decoder = Decoder::new(&dcae, &params)?;
        if task.model.repa.is_some() != task.repa.is_some() {
            return Err(TrainError::Config {
                origin: "task".into(),
                reason: "`repa` names the encoder and `model.repa` its projector: give both or \
                         neither"
                    .into(),
            });
        }
        let teacher = |repa| Teacher::new(task, repa, &latents, precision);
        let teacher = task.repa.as_ref().map(teacher).transpose()?;
        let mut this = Self {
            teacher,
            common,
            task,
            latents,
            schedule: FlowMatchEuler::nitro_e(),
            tokenizer,
            text_encoder,
            decoder,
            scaling_factor: dcae.scaling_factor,
            empty_text: Tensor::zeros([1, 1, 1], &device),
        };
        this.empty_text = this.text_states(&[""])?;
        Ok(this)
    }

    /// The text encoder's last hidden states, `[captions, text_tokens, width]`.
    fn text_states<S: AsRef<str>>(&self, captions: &[S]) -> Result<Tensor<3>, TrainError> {
        let length = self.task.text_tokens;
        let (ids, mask) = encode_all(&self.tokenizer, captions, length, &Device::flex())?;
        Ok(self.text_encoder.forward(ids, mask)?)
    }

    /// A batch as tensors, with what the frozen encoders make of it.
    fn inputs(&self, batch: Pairs) -> Result<Inputs, TrainError> {
        let [c, h, w] = self.latents.shape;
        let shape = [batch.timesteps.len(), c, h, w];
        let device = Device::flex();
        let latent =
            |values: Vec<f32>| Tensor::<4>::from_data(TensorData::new(values, shape), &device);
        let features = |teacher: &Teacher| -> Result<_, TrainError> {
            Ok((teacher.features(batch.pictures)?, teacher.weight))
        };
        Ok(Inputs {
            features: self.teacher.as_ref().map(features).transpose()?,
            noisy: latent(batch.noisy),
            target: velocity_tokens(latent(batch.target), self.task.model.patch_size),
            text: self.text_states(&batch.captions)?,
            times: batch.timesteps,
        })
    }

    /// Pictures `[prompts, 3, side, side]` that the averaged weights make, one per prompt and seed.
    fn pictures(
        &self,
        averaged: &TensorMap,
        prompts: &[&str],
        seeds: &[u64],
    ) -> Result<Tensor<4>, TrainError> {
        let device = Device::flex();
        let precision = Precision::from(self.common.precision);
        let params = Params::new(averaged, &device, precision).for_inference();
        let model = Emmdit::new(&self.task.model, &params)?;
        let [c, h, w] = self.latents.shape;
        let count = prompts.len();
        let empty = self.empty_text.clone().repeat_dim(0, count);
        let text = Tensor::cat(vec![empty, self.text_states(prompts)?], 0);
        let noise = NoiseKind::TorchCpu.per_sample(seeds, c * h * w);
        let timetable = self.schedule.timetable(STEPS)?;
        let latents = Euler::new(&timetable).run(
            noise,
            count,
            guidance::classifier_free(GUIDANCE, |both: &[f32], timestep| {
                let both = TensorData::new(both.to_vec(), [2 * count, c, h, w]);
                let times = vec![timestep; 2 * count];
                let v = model.forward(Tensor::from_data(both, &device), text.clone(), &times)?;
                Ok::<_, TrainError>(v.into_data().try_into_vec::<f32>().unwrap_or_default())
            }),
            |_| std::ops::ControlFlow::Continue(()),
        );
        let latents = latents.map_err(|error| TrainError::Config {
            origin: "sampling".into(),
            reason: error.to_string(),
        })?;
        let latents = Tensor::<4>::from_data(TensorData::new(latents, [count, c, h, w]), &device);
        Ok(self.decoder.decode(latents / self.scaling_factor)?)
    }
}

impl Task for EmmditTraining<'_> {
    type Batch = Pairs;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Emmdit::new(&self.task.model, p)?;
        Ok(())
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Pairs, TrainError> {
        let density = Density::LogitNormal {
            mean: f64::from(self.task.logit_mean),
            std: f64::from(self.task.logit_std),
        };
        let first = step * self.common.batch_size as u64;
        let index = |i| shuffled(self.common.seed, first + i as u64, self.latents.len());
        let pairs: Vec<usize> = examples.clone().map(index).collect();
        let mut batch = Pairs {
            noisy: Vec::new(),
            target: Vec::new(),
            captions: Vec::new(),
            timesteps: Vec::new(),
            pictures: match &self.teacher {
                Some(teacher) => teacher.pictures(&self.latents, &pairs),
                None => Vec::new(),
            },
        };
        for (index, example) in pairs.into_iter().zip(examples) {
            let (latent, caption) = self.latents.pair(index);
            let mut rng = noise_generator(self.common.seed, step, example);
            let u = density.sample(1, &mut rng)[0];
            let level = self.schedule.level(u);
            let keep = f64::from(rng.rand(1)[0]) >= self.task.caption_dropout;
            let noise = rng.randn(latent.len());
            batch.timesteps.push(level.timestep);
            batch
                .captions
                .push(if keep { caption } else { "" }.to_owned());
            for (z, n) in latent.iter().zip(noise) {
                let z = z.to_f32();
                batch.noisy.push((1.0 - level.sigma) * z + level.sigma * n);
                batch.target.push(n - z);
            }
        }
        Ok(batch)
    }

    fn loss(&self, p: &Params<'_>, batch: Pairs) -> Result<Losses, TrainError> {
        let Inputs {
            noisy,
            target,
            text,
            times,
            features,
        } = self.inputs(batch)?;
        let model = Emmdit::new(&self.task.model, p)?;
        let output = model.forward_train(noisy, text, &times)?;
        let difference = flow_matching(output.tokens, target);
        let value = |loss: &Tensor<1>| f64::from(loss.clone().into_scalar::<f32>());
        let mut parts = Vec::new();
        let mut total = difference.clone();
        if let Some((features, weight)) = features
            && let Some(aligned) = alignment(output.projections, &[features])
        {
            parts.push(("diff_loss", value(&difference)));
            parts.push(("proj_loss", value(&aligned)));
            total = total + aligned * weight;
        }
        Ok(Losses { total, parts })
    }

    fn gradients(
        &self,
        store: &ParameterStore,
        precision: Precision,
        batch: Pairs,
    ) -> Result<Measured, TrainError> {
        if !self.task.grad_checkpointing {
            return whole_gradients(self, store, precision, batch);
        }
        let inputs = self.inputs(batch)?;
        let weight = inputs.features.as_ref().map(|(_, weight)| *weight);
        let (difference, aligned, gradients) =
            recompute::gradients(&self.task.model, store, precision, &inputs)?;
        let mut numbers = vec![("loss", difference)];
        if let (Some(aligned), Some(weight)) = (aligned, weight) {
            numbers[0].1 += aligned * weight;
            numbers.push(("diff_loss", difference));
            numbers.push(("proj_loss", aligned));
        }
        Ok(Measured { numbers, gradients })
    }

    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError> {
        let seeds: Vec<u64> = (0..PROMPTS.len() as u64).collect();
        let path = sample_path(dir, step);
        write_grid(&path, self.pictures(averaged, &PROMPTS, &seeds)?, 8)?;
        Ok(Some(path))
    }

    /// The share of pictures right, of some prompts of the shapes bench spread over its tasks.
    fn score(&self, averaged: &TensorMap) -> Result<Option<f64>, TrainError> {
        let bench = shapes_bench();
        let count = self.task.score_prompts.min(bench.len());
        if count == 0 {
            return Ok(None);
        }
        let chosen: Vec<_> = (0..count)
            .map(|i| &bench[i * bench.len() / count])
            .collect();
        let mut correct = 0;
        for group in chosen.chunks(TOGETHER) {
            let prompts: Vec<&str> = group.iter().map(|prompt| prompt.prompt()).collect();
            // Seed 0 for each, as the bench's first picture of a prompt has.
            let pictures = self.pictures(averaged, &prompts, &vec![0; group.len()])?;
            let [_, _, height, width] = pictures.dims();
            for (prompt, rgb) in group.iter().zip(to_bytes(pictures)) {
                let judged = score_image(prompt, "a sample", &rgb, width, height);
                let judged = judged.map_err(|error| TrainError::Config {
                    origin: "the score".into(),
                    reason: error.to_string(),
                })?;
                correct += usize::from(judged.correct);
            }
        }
        Ok(Some(correct as f64 / count as f64))
    }

    fn fingerprint(&self) -> Result<String, TrainError> {
        let mut text = format!(
            "{} pairs {:08x}",
            self.latents.len(),
            self.latents.checksum()
        );
        let encoder = self.task.frozen.join("text_encoder");
        let mut parts = vec![
            ("text encoder", encoder.join("model.safetensors")),
            ("tokenizer", encoder.join("tokenizer.json")),
        ];
        if let Some(repa) = &self.task.repa {
            parts.push(("visual encoder", repa.encoder.join("model.safetensors")));
        }
        for (name, path) in parts {
            let bytes = std::fs::read(&path).map_err(|source| TrainError::Io { path, source })?;
            text += &format!(", {name} {:08x}", crc32c::crc32c(&bytes));
        }
        Ok(text)
    }
}
