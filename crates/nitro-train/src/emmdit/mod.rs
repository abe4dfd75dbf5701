//! Training the E-MMDiT: flow matching on latents with captions.
//!
//! Per example: `u` is logit-normal and chooses a timestep and its sigma, `x = (1 - sigma) z +
//! sigma noise`, and the model is to give `noise - z`; a caption is replaced by the empty one with
//! some probability, which is what classifier-free guidance needs. With REPA, the first group's image
//! tokens are projected and aligned with a frozen DINOv2's patch features of the clean picture.
//! Source: the official `train.py`.
//!
//! Examples come from a [`source`]: cached pairs of the shapes world, or MDS shards.

mod pairs;
mod shards;
mod source;
mod watch;

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_data::mds::Damage;
use nitro_diffusion::schedule::{Density, FlowMatchEuler};
use nitro_models::emmdit::Emmdit;
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use nitro_pipeline::{EncoderParts, Encoders, HubOptions, ModelLocation};

use self::pairs::Pairs;
use self::shards::Shards;
use self::source::{Source, Text, Wanted, WantedRepa};
use crate::TrainError;
use crate::config::{CommonConfig, DataConfig, EmmditTask, MdsData, RepaTask};
use crate::data::noise_generator;
use crate::files::{checksum, checksum_of};
use crate::frozen::values;
use crate::losses::{alignment, flow_matching, velocity_tokens};
use crate::null_text;
use crate::recompute::{self, Inputs};
use crate::repa::Teacher;
use crate::store::ParameterStore;
use crate::trainer::{Losses, Measured, Task, whole_gradients};

pub(crate) use self::watch::{BenchScores, GUIDANCE, STEPS};

/// An E-MMDiT, its data, and the frozen parts around it.
pub struct EmmditTraining<'a> {
    common: &'a CommonConfig,
    task: &'a EmmditTask,
    source: Box<dyn Source>,
    /// What stored latents are multiplied by.
    scale: f32,
    schedule: FlowMatchEuler,
    /// Text encoder and autoencoder, as far as the run needs them.
    frozen: Option<Encoders>,
    /// States of the empty prompt, `[text_tokens, channels]`, where the data hold states.
    null_text: Vec<f32>,
    teacher: Option<Teacher>,
}

/// Examples of one step.
pub struct Batch {
    noisy: Vec<f32>,  // [count, c, h, w]
    target: Vec<f32>, // likewise: the velocity
    captions: Vec<String>,
    states: Vec<f32>, // [count, text_tokens, channels] in the captions' place
    timesteps: Vec<f32>,
    repa: Vec<f32>, // pictures for the teacher, or features
}

/// The parts of the run `task` that exist only while it runs, by what must be there.
struct Needs {
    /// Sample pictures or scores are made.
    watched: bool,
    /// Captions come as text.
    captions: bool,
}

impl Needs {
    fn of(common: &CommonConfig, task: &EmmditTask) -> Self {
        Self {
            watched: common.sample_every > 0 || common.score_every > 0,
            captions: match &task.data {
                DataConfig::Latents { .. } => true,
                DataConfig::Mds(data) => !data.precompute_txt_emb,
            },
        }
    }
}

impl<'a> EmmditTraining<'a> {
    /// Opens the data and the frozen models that `task` names.
    pub fn new(common: &'a CommonConfig, task: &'a EmmditTask) -> Result<Self, TrainError> {
        let precision = Precision::from(common.precision);
        let needs = Needs::of(common, task);
        let (teacher, wanted) = wanted(task, precision)?;
        // The data first: frozen models may be large, and far away.
        let source = open_source(common, task, wanted)?;
        let known = known_null_text(task)?;
        let missing = known.is_none() && !needs.captions;
        let parts = EncoderParts {
            texts: needs.captions || needs.watched || missing,
            text_tokens: Some(task.text_tokens),
            decoder: needs.watched,
            pictures: false,
        };
        let unscaled = matches!(&task.data, DataConfig::Mds(d) if d.scaling_factor.is_none());
        let frozen = match parts.texts || parts.decoder || unscaled {
            true => Some(load_frozen(task, parts, precision)?),
            false => None,
        };
        let mut this = Self {
            common,
            task,
            source,
            scale: match &task.data {
                // Stored as the model sees them.
                DataConfig::Latents { .. } => 1.0,
                DataConfig::Mds(data) => scale(data, frozen.as_ref())? as f32,
            },
            schedule: FlowMatchEuler::nitro_e(),
            frozen,
            null_text: known.unwrap_or_default(),
            teacher,
        };
        if missing {
            // As the official trainer has it.
            this.null_text = values(this.text_states(&[""])?);
        }
        Ok(this)
    }

    fn frozen(&self) -> Result<&Encoders, TrainError> {
        self.frozen.as_ref().ok_or_else(no_frozen)
    }

    /// The text encoder's last hidden states, `[captions, text_tokens, channels]`.
    fn text_states<S: AsRef<str>>(&self, captions: &[S]) -> Result<Tensor<3>, TrainError> {
        let captions: Vec<&str> = captions.iter().map(AsRef::as_ref).collect();
        let states = self.frozen()?.encode_raw_texts(&captions)?.features;
        let [_, _, found] = states.dims();
        let expected = self.task.model.caption_channels;
        match found == expected {
            true => Ok(states),
            false => Err(TrainError::Config {
                origin: "task.model.caption_channels".into(),
                reason: format!("{expected}, but the text encoder's states have {found} channels"),
            }),
        }
    }

    /// A batch as tensors, with what the frozen encoders make of it.
    fn inputs(&self, batch: Batch) -> Result<Inputs, TrainError> {
        let model = &self.task.model;
        let count = batch.timesteps.len();
        let shape = [
            count,
            model.in_channels,
            model.sample_size,
            model.sample_size,
        ];
        let device = Device::flex();
        let latent =
            |values: Vec<f32>| Tensor::<4>::from_data(TensorData::new(values, shape), &device);
        let three = |values: Vec<f32>, tokens: usize| {
            let width = values.len() / (count * tokens).max(1);
            Tensor::<3>::from_data(TensorData::new(values, [count, tokens, width]), &device)
        };
        let grid = model.sample_size / model.patch_size;
        let features = match (&self.task.repa, &self.teacher) {
            (None, _) => None,
            (Some(repa), Some(teacher)) => Some((teacher.features(batch.repa)?, repa.weight)),
            (Some(repa), None) => Some((three(batch.repa, grid * grid), repa.weight)),
        };
        Ok(Inputs {
            features,
            noisy: latent(batch.noisy),
            target: velocity_tokens(latent(batch.target), model.patch_size),
            text: match self.source.gives_captions() {
                true => self.text_states(&batch.captions)?,
                false => three(batch.states, self.task.text_tokens),
            },
            times: batch.timesteps,
        })
    }
}

/// Checks the task's parts against each other, opens REPA's teacher, and tells what the data must
/// hold.
fn wanted(
    task: &EmmditTask,
    precision: Precision,
) -> Result<(Option<Teacher>, Wanted), TrainError> {
    let model = &task.model;
    model.check()?;
    let wrong = |origin: &str, reason: String| {
        Err(TrainError::Config {
            origin: origin.to_owned(),
            reason,
        })
    };
    let side = model.sample_size;
    if let Err(reason) = model.check_input(side, side, task.text_tokens) {
        return wrong("task", reason);
    }
    let grid = side / model.patch_size;
    let (teacher, repa) = match (&task.repa, &model.repa) {
        (None, None) => (None, WantedRepa::Nothing),
        (Some(_), None) | (None, Some(_)) => {
            let reason = "`repa` says what to align with and `model.repa` the projector: give both \
                          or neither";
            return wrong("task", reason.to_owned());
        }
        (Some(repa), Some(projector)) => {
            let &[width] = projector.z_dims.as_slice() else {
                let reason = format!("{:?}: expected one projector", projector.z_dims);
                return wrong("task.model.repa.z_dims", reason);
            };
            match (reads_features(&task.data), &repa.encoder) {
                (true, _) => (None, WantedRepa::Features([grid * grid, width])),
                (false, Some(path)) => {
                    let teacher = Teacher::open(path, grid, width, precision)?;
                    let side = teacher.side;
                    (Some(teacher), WantedRepa::Picture(side))
                }
                (false, None) => {
                    let reason = "names no encoder; give one, or precomputed features \
                                  (data.precompute_dino_feat)";
                    return wrong("task.repa.encoder", reason.to_owned());
                }
            }
        }
    };
    let wanted = Wanted {
        latent: [model.in_channels, side, side],
        text: [task.text_tokens, model.caption_channels],
        repa,
    };
    Ok((teacher, wanted))
}

fn reads_features(data: &DataConfig) -> bool {
    matches!(data, DataConfig::Mds(data) if data.precompute_dino_feat)
}

/// The empty prompt's states that lie beside the data; `None` if there are none or none are needed.
fn known_null_text(task: &EmmditTask) -> Result<Option<Vec<f32>>, TrainError> {
    let shape = [task.text_tokens, task.model.caption_channels];
    match &task.data {
        DataConfig::Mds(data) if data.precompute_txt_emb => {
            null_text::find(data.null_emb_path.as_deref(), &data.folders(), shape)
        }
        _ => Ok(None),
    }
}

/// Number of training examples and of steps in an epoch, after a check that they suit the model; no
/// frozen model but REPA's is needed.
pub(crate) fn data_size(
    common: &CommonConfig,
    task: &EmmditTask,
) -> Result<(usize, u64), TrainError> {
    let (_, wanted) = wanted(task, Precision::from(common.precision))?;
    known_null_text(task)?;
    Ok(open_source(common, task, wanted)?.size())
}

fn no_frozen() -> TrainError {
    TrainError::Config {
        origin: "task.frozen".into(),
        reason: "names no model, but the run needs its text encoder or autoencoder: for captions \
                 that are not precomputed, for the empty prompt where no null_emb.safetensors lies \
                 beside the shards, for scaling_factor where it is not given, and for pictures and \
                 scores (run.sample_every=0 run.score_every=0 makes none)"
            .into(),
    }
}

fn load_frozen(
    task: &EmmditTask,
    parts: EncoderParts,
    precision: Precision,
) -> Result<Encoders, TrainError> {
    let place = task.frozen.as_ref().ok_or_else(no_frozen)?;
    let location = ModelLocation::from(place.to_string_lossy().as_ref());
    let hub = HubOptions::from_env();
    let device = Device::flex();
    Ok(Encoders::load(location, hub, parts, device, precision)?)
}

fn open_source(
    common: &CommonConfig,
    task: &EmmditTask,
    wanted: Wanted,
) -> Result<Box<dyn Source>, TrainError> {
    Ok(match &task.data {
        DataConfig::Latents { folder } => Box::new(Pairs::open(folder, common, wanted)?),
        DataConfig::Mds(data) => Box::new(Shards::open(data, common, wanted)?),
    })
}

/// What latents are multiplied by.
fn scale(data: &MdsData, frozen: Option<&Encoders>) -> Result<f64, TrainError> {
    let own = frozen.map(|frozen| frozen.autoencoder().scaling_factor);
    match (data.scaling_factor, own) {
        (Some(said), Some(own)) if (said - own).abs() > 1e-6 * own => Err(TrainError::Config {
            origin: "task.data.scaling_factor".into(),
            reason: format!("{said}, but the frozen autoencoder's is {own}"),
        }),
        (said, own) => said.or(own).ok_or_else(no_frozen),
    }
}

impl Task for EmmditTraining<'_> {
    type Batch = Batch;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Emmdit::new(&self.task.model, p)?;
        Ok(())
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Batch, TrainError> {
        let density = Density::LogitNormal {
            mean: f64::from(self.task.logit_mean),
            std: f64::from(self.task.logit_std),
        };
        let mut batch = Batch {
            noisy: Vec::new(),
            target: Vec::new(),
            captions: Vec::new(),
            states: Vec::new(),
            timesteps: Vec::new(),
            repa: Vec::new(),
        };
        let read = self.source.read(step, examples.clone())?;
        for (example, number) in read.into_iter().zip(examples) {
            let mut rng = noise_generator(self.common.seed, step, number);
            let u = density.sample(1, &mut rng)[0];
            let level = self.schedule.level(u);
            let keep = f64::from(rng.rand(1)[0]) >= self.task.caption_dropout;
            let noise = rng.randn(example.latent.len());
            batch.timesteps.push(level.timestep);
            match example.text {
                Text::Caption(caption) if keep => batch.captions.push(caption),
                Text::Caption(_) => batch.captions.push(String::new()),
                Text::States(states) if keep => batch.states.extend(states),
                Text::States(_) => batch.states.extend(&self.null_text),
            }
            for (z, n) in example.latent.iter().zip(noise) {
                let z = z * self.scale;
                batch.noisy.push((1.0 - level.sigma) * z + level.sigma * n);
                batch.target.push(n - z);
            }
            batch.repa.extend(example.repa);
        }
        Ok(batch)
    }

    fn loss(&self, p: &Params<'_>, batch: Batch) -> Result<Losses, TrainError> {
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
        batch: Batch,
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
        self.sample_grid(averaged, step, dir).map(Some)
    }

    fn score(&self, averaged: &TensorMap) -> Result<Option<f64>, TrainError> {
        match self.task.score_prompts {
            0 => Ok(None),
            count => Ok(Some(self.bench_scores(averaged, count)?.right)),
        }
    }

    fn damage(&self) -> Vec<Damage> {
        self.source.damage()
    }

    fn fingerprint(&self) -> Result<String, TrainError> {
        let mut text = self.source.fingerprint()?;
        if self.source.gives_captions() {
            let files = self.frozen()?.text_files().into_iter().flatten();
            for (name, file) in ["text encoder", "tokenizer"].into_iter().zip(files) {
                text += &format!(", {name} {:08x}", checksum(file)?);
            }
        } else {
            let states: &[u8] = bytemuck::cast_slice(&self.null_text);
            text += &format!(", empty prompt {:08x}", crc32c::crc32c(states));
        }
        if let (
            Some(RepaTask {
                encoder: Some(path),
                ..
            }),
            true,
        ) = (&self.task.repa, self.teacher.is_some())
        {
            let path = match path.is_dir() {
                true => path.join("model.safetensors"),
                false => path.clone(),
            };
            text += &format!(", visual encoder {:08x}", checksum_of(&path)?);
        }
        Ok(text)
    }
}
