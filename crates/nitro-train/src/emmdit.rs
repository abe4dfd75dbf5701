//! Training the E-MMDiT: flow matching on cached latents with captions.
//!
//! Per example: `u` is logit-normal and chooses a timestep and its sigma, `x = (1 - sigma) z +
//! sigma noise`, and the model is to give `noise - z`; a caption is replaced by the empty one with
//! some probability, which is what classifier-free guidance needs. With REPA, the first group's image
//! tokens are projected and aligned with a frozen DINOv2's patch features of the clean picture.
//! Source: the official `train.py`.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::guidance;
use nitro_diffusion::noise::NoiseKind;
use nitro_diffusion::sampler::Euler;
use nitro_diffusion::schedule::{Density, FlowMatchEuler};
use nitro_models::dcae::{DcaeConfig, Decoder};
use nitro_models::emmdit::Emmdit;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{Params, TensorMap, WeightFiles};
use nitro_ops::Precision;
use tokenizers::Tokenizer;

use crate::TrainError;
use crate::config::{CommonConfig, EmmditTask};
use crate::data::{shuffled, step_generator};
use crate::language_model::encode_all;
use crate::latents::{Latents, read_config};
use crate::losses::{alignment, flow_matching, velocity_tokens};
use crate::pictures::write_grid;
use crate::repa::Teacher;
use crate::trainer::{Losses, Task};

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

/// The examples of one step.
pub struct Pairs {
    noisy: Tensor<4>,
    target: Tensor<3>, // [batch, tokens, patch * patch * c]
    text: Tensor<3>,
    timesteps: Vec<f32>,
    features: Vec<Tensor<3>>, // REPA's target, if any
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
}

impl Task for EmmditTraining<'_> {
    type Batch = Pairs;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Emmdit::new(&self.task.model, p)?;
        Ok(())
    }

    fn batch(&self, step: u64) -> Result<Pairs, TrainError> {
        let count = self.common.batch_size;
        let [c, h, w] = self.latents.shape;
        let mut rng = step_generator(self.common.seed, step);
        let density = Density::LogitNormal {
            mean: f64::from(self.task.logit_mean),
            std: f64::from(self.task.logit_std),
        };
        let levels: Vec<_> = density
            .sample(count, &mut rng)
            .into_iter()
            .map(|u| self.schedule.level(u))
            .collect();
        let dropped = rng.rand(count);
        let noise = rng.randn(count * c * h * w);
        let place = step * count as u64;
        let pairs: Vec<usize> = (0..count as u64)
            .map(|i| shuffled(self.common.seed, place + i, self.latents.len()))
            .collect();
        let mut captions = Vec::with_capacity(count);
        let (mut noisy, mut target) = (Vec::new(), Vec::new());
        for (i, level) in levels.iter().enumerate() {
            let (latent, caption) = self.latents.pair(pairs[i]);
            let keep = f64::from(dropped[i]) >= self.task.caption_dropout;
            captions.push(if keep { caption } else { "" });
            let noise = &noise[i * c * h * w..(i + 1) * c * h * w];
            for (z, n) in latent.iter().zip(noise) {
                let z = z.to_f32();
                noisy.push((1.0 - level.sigma) * z + level.sigma * n);
                target.push(n - z);
            }
        }
        let device = Device::flex();
        let shape = [count, c, h, w];
        let target = Tensor::<4>::from_data(TensorData::new(target, shape), &device);
        Ok(Pairs {
            noisy: Tensor::from_data(TensorData::new(noisy, shape), &device),
            target: velocity_tokens(target, self.task.model.patch_size),
            text: self.text_states(&captions)?,
            timesteps: levels.iter().map(|level| level.timestep).collect(),
            features: match &self.teacher {
                Some(teacher) => vec![teacher.features(&self.latents, &pairs)?],
                None => Vec::new(),
            },
        })
    }

    fn loss(&self, p: &Params<'_>, batch: Pairs) -> Result<Losses, TrainError> {
        let model = Emmdit::new(&self.task.model, p)?;
        let output = model.forward_train(batch.noisy, batch.text, &batch.timesteps)?;
        let difference = flow_matching(output.tokens, batch.target);
        let aligned = alignment(output.projections, &batch.features).zip(self.teacher.as_ref());
        let Some((aligned, teacher)) = aligned else {
            return Ok(Losses {
                total: difference,
                parts: Vec::new(),
            });
        };
        let value = |loss: &Tensor<1>| f64::from(loss.clone().into_scalar::<f32>());
        Ok(Losses {
            parts: vec![
                ("diff_loss", value(&difference)),
                ("proj_loss", value(&aligned)),
            ],
            total: difference + aligned * teacher.weight,
        })
    }

    fn sample(&self, averaged: &TensorMap, step: u64, dir: &Path) -> Result<(), TrainError> {
        let device = Device::flex();
        let precision = Precision::from(self.common.precision);
        let params = Params::new(averaged, &device, precision).for_inference();
        let model = Emmdit::new(&self.task.model, &params)?;
        let [c, h, w] = self.latents.shape;
        let count = PROMPTS.len();
        let empty = self.empty_text.clone().repeat_dim(0, count);
        let text = Tensor::cat(vec![empty, self.text_states(&PROMPTS)?], 0);
        let seeds: Vec<u64> = (0..count as u64).collect();
        let noise = NoiseKind::TorchCpu.per_sample(&seeds, c * h * w);
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
        let latents = match latents {
            Ok(latents) => latents,
            Err(error) => {
                let path = dir.to_owned();
                return Err(TrainError::Picture {
                    path,
                    reason: error.to_string(),
                });
            }
        };
        let latents = Tensor::<4>::from_data(TensorData::new(latents, [count, c, h, w]), &device);
        let pictures = self.decoder.decode(latents / self.scaling_factor)?;
        write_grid(&dir.join(format!("step-{step:08}.png")), pictures, 8)
    }
}
