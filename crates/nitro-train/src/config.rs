//! One YAML file describes a run; `key.path=value` on the command line overrides it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nitro_models::dcae::DcaeConfig;
use nitro_models::dinov2::Dinov2Config;
use nitro_models::emmdit::EmmditConfig;
use nitro_models::llama::LlamaConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;
use crate::configs;
pub use crate::data_config::{DataConfig, MdsData, StreamConfig, WeightedStream};
use crate::distill::DistillTask;
use crate::grpo::GrpoTask;
use crate::lora::LoraTask;
use crate::optimizer::learning_rate;
use crate::preference::PreferenceTask;

/// A training run, as resolved from its YAML file and overrides.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What every run has.
    pub run: CommonConfig,
    /// The model being trained and its data.
    pub task: TaskConfig,
}

/// What every run has.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonConfig {
    /// Seed of initialisation, data and noise.
    pub seed: u64,
    /// Weights to start from instead of a fresh initialisation: a run's folder (the average of its
    /// newest checkpoint), a checkpoint, or exported weights. REPA projectors may be missing or
    /// left over.
    #[serde(default)]
    pub init_from: Option<PathBuf>,
    /// Optimiser steps.
    pub max_steps: u64,
    /// Examples per step, over all processes.
    pub batch_size: usize,
    /// Parts that a process's share of a step is computed in, one after the other, to save memory
    /// (gradient accumulation).
    #[serde(default = "one_part")]
    pub accumulate: usize,
    /// Parts that are computed at the same time, each on the threads that the others leave free: small
    /// models gain, whose operations are too short to be shared out well. `accumulate` counts rounds of
    /// so many parts.
    #[serde(default = "one_part")]
    pub parallel: usize,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// Steps at the end over which the learning rate falls linearly to zero.
    #[serde(default)]
    pub decay_steps: u64,
    /// Steps at which the learning rate is at its full height again; it falls over the `decay_steps`
    /// before each of them, too (warm restarts as in SGDR, arXiv 1608.03983).
    #[serde(default)]
    pub restarts: Vec<u64>,
    /// Largest norm of the whole gradient.
    pub gradient_clip: f64,
    /// Decay of the exponential moving average of the weights, which is what is exported; 0 exports
    /// the weights as they are.
    pub ema_rate: f64,
    /// How matrix products are computed in forward and backward passes; weights stay `f32`.
    pub precision: ComputePrecision,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Checkpoints kept.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// Steps between lines of `metrics.jsonl`.
    pub log_every: u64,
    /// Steps between sample pictures, the first at step 0; 0 writes none.
    pub sample_every: u64,
    /// Steps between scores, the first at step 0; 0 computes none. The weights of the best score are
    /// kept as `checkpoints/best.safetensors`.
    #[serde(default)]
    pub score_every: u64,
}

fn one_part() -> usize {
    1
}

fn default_keep() -> usize {
    2
}

/// AdamW's hyper-parameters, in PyTorch's names.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decay of the first and second moment.
    pub betas: (f64, f64),
}

/// How products are computed in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputePrecision {
    /// Single precision.
    F32,
    /// bfloat16 products, `f32` accumulation.
    Bf16,
}

impl From<ComputePrecision> for nitro_ops::Precision {
    fn from(value: ComputePrecision) -> Self {
        match value {
            ComputePrecision::F32 => Self::F32,
            ComputePrecision::Bf16 => Self::Bf16,
        }
    }
}

/// The model being trained and its data.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TaskConfig {
    /// A DC-AE on pictures of the shapes world.
    Autoencoder(AutoencoderTask),
    /// The tokenizer and the Llama text encoder on captions of the shapes world.
    LanguageModel(LanguageModelTask),
    /// A DINOv2 on pictures of the shapes world: REPA's teacher.
    VisualEncoder(VisualEncoderTask),
    /// The E-MMDiT on cached latents and captions.
    Emmdit(EmmditTask),
    /// A small CLIP on pictures of the shapes world: the miniature's preference model.
    Preference(PreferenceTask),
    /// Low-rank adapters of a model on a folder of pictures with captions.
    Lora(LoraTask),
    /// Group-relative policy optimisation of a model's adapters.
    Grpo(Box<GrpoTask>),
    /// Distillation of a model into one of few steps.
    Distill(Box<DistillTask>),
}

impl TaskConfig {
    /// The kind as written in YAML.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Autoencoder(_) => "autoencoder",
            Self::LanguageModel(_) => "language_model",
            Self::VisualEncoder(_) => "visual_encoder",
            Self::Emmdit(_) => "emmdit",
            Self::Preference(_) => "preference",
            Self::Lora(_) => "lora",
            Self::Grpo(_) => "grpo",
            Self::Distill(_) => "distill",
        }
    }
}

/// Autoencoder training.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencoderTask {
    /// The architecture; `scaling_factor` is measured when the run ends.
    pub model: DcaeConfig,
    /// Side of the rendered pictures.
    pub image_size: usize,
    /// Side of the random crops trained on until `full_size_steps` before the end.
    pub crop_size: usize,
    /// Steps at the end on whole pictures.
    pub full_size_steps: u64,
    /// Standard deviation of the noise added to latents before decoding, so that the decoder
    /// forgives what a denoiser leaves.
    pub latent_noise: f64,
    /// Weight of the penalty `mean(z^2)` that keeps latents near unit size.
    pub latent_penalty: f64,
}

/// Tokenizer and language model training.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageModelTask {
    /// The architecture; `vocab_size` is set by the tokenizer.
    pub model: LlamaConfig,
    /// Largest vocabulary of the byte-pair tokenizer, special tokens included.
    pub vocab_size: usize,
    /// Captions the tokenizer is trained on.
    pub tokenizer_captions: usize,
    /// Tokens a caption is padded or cut to.
    pub text_tokens: usize,
}

/// Training of REPA's teacher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisualEncoderTask {
    /// The architecture; pictures are rendered at `img_size`.
    pub model: Dinov2Config,
}

/// Alignment with a frozen encoder's features (REPA).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepaTask {
    /// The DINOv2: a folder with `config.json` and `model.safetensors`, or a released checkpoint.
    /// Shards with precomputed features need none.
    #[serde(default)]
    pub encoder: Option<PathBuf>,
    /// Weight of the alignment in the loss (the official `proj_coeff`).
    pub weight: f64,
}

/// E-MMDiT training.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmmditTask {
    /// The architecture.
    pub model: EmmditConfig,
    /// The training examples. Runs of older versions had `latents: FOLDER`.
    #[serde(alias = "latents", deserialize_with = "crate::data_config::read")]
    pub data: DataConfig,
    /// Model folder or Hub repository with the frozen autoencoder (`dc-ae`) and text encoder
    /// (`text_encoder`). Shards with precomputed text states need it for pictures and scores only.
    #[serde(default)]
    pub frozen: Option<PathBuf>,
    /// REPA; the model then has a projector of the encoder's width (`model.repa`).
    #[serde(default)]
    pub repa: Option<RepaTask>,
    /// Computes blocks again for their gradient instead of keeping their intermediate results: memory
    /// for one block, for a third more arithmetic (the official `grad_checkpointing`).
    #[serde(default)]
    pub grad_checkpointing: bool,
    /// Prompts of the sample pictures; prompts of the shapes world, or of shards the first captions, if
    /// none are given.
    #[serde(default)]
    pub sample_prompts: Vec<String>,
    /// Prompts of the shapes bench that a score is measured on, one picture each.
    #[serde(default = "default_score_prompts")]
    pub score_prompts: usize,
    /// Tokens a caption is padded or cut to.
    pub text_tokens: usize,
    /// Probability of replacing a caption with the empty one, for classifier-free guidance.
    pub caption_dropout: f64,
    /// Mean of the logit-normal timestep density.
    #[serde(default)]
    pub logit_mean: f32,
    /// Standard deviation of the logit-normal timestep density.
    #[serde(default = "one")]
    pub logit_std: f32,
}

fn default_score_prompts() -> usize {
    60
}

fn one() -> f32 {
    1.0
}

impl CommonConfig {
    /// Parts that a process's share of a step is computed in.
    pub fn parts(&self) -> usize {
        self.accumulate * self.parallel
    }

    /// The learning rate in force at `step` (0-based).
    pub fn learning_rate(&self, step: u64) -> f64 {
        let restarts = self.restarts.iter().filter(|restart| **restart > step);
        let end = restarts.fold(self.max_steps, |end, restart| end.min(*restart));
        let (warmup, decay) = (self.warmup_steps, self.decay_steps);
        learning_rate(self.optimizer.lr, step, end, warmup, decay)
    }
}

impl RunConfig {
    /// Reads `path` and applies `key.path=value` overrides, whose values are YAML.
    ///
    /// A path `configs/NAME.yaml` where no file is means the one that comes with the program
    /// ([`configs::SHIPPED`]), so that the commands of the documentation work in any folder.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, TrainError> {
        let origin = path.display().to_string();
        match (std::fs::read_to_string(path), configs::by_path(path)) {
            (Ok(text), _) => Self::from_text(&text, &origin, overrides),
            (Err(error), Some(text)) if error.kind() == ErrorKind::NotFound => {
                Self::from_text(text, &origin, overrides)
            }
            (Err(source), _) => Err(TrainError::Io {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Takes `configs/NAME.yaml` as it comes with the program and applies overrides.
    pub fn shipped(name: &str, overrides: &[String]) -> Result<Self, TrainError> {
        let origin = format!("configs/{name}.yaml");
        match configs::by_name(name) {
            Some(text) => Self::from_text(text, &origin, overrides),
            None => Err(TrainError::Config {
                origin,
                reason: "no such file comes with the program".to_owned(),
            }),
        }
    }

    /// Reads a configuration's text and applies overrides; `origin` is what messages call it.
    pub fn from_text(text: &str, origin: &str, overrides: &[String]) -> Result<Self, TrainError> {
        Self::parse(text, overrides).map_err(|reason| TrainError::Config {
            origin: origin.to_owned(),
            reason,
        })
    }

    /// Whether a run of `processes` can be made of it, and if not, why.
    pub fn check(&self, processes: usize) -> Result<(), TrainError> {
        let run = &self.run;
        let parts = run.parts();
        let whole = matches!(self.task, TaskConfig::Grpo(_) | TaskConfig::Distill(_));
        let reason = if run.batch_size == 0 || parts == 0 {
            "batch_size, accumulate and parallel must be at least 1".to_owned()
        } else if !run.batch_size.is_multiple_of(processes * parts) {
            format!(
                "batch_size {} does not divide among {processes} processes and {parts} parts of each \
                 (accumulate {}, parallel {})",
                run.batch_size, run.accumulate, run.parallel
            )
        } else if whole && run.parallel > 1 {
            format!(
                "a task of kind `{}` computes one part at a time: parallel must be 1",
                self.task.kind()
            )
        } else if whole && processes > 1 {
            format!(
                "a task of kind `{}` runs as one process, and {processes} were started",
                self.task.kind()
            )
        } else if run.save_every == 0 || run.log_every == 0 {
            "save_every and log_every must be at least 1".to_owned()
        } else {
            return Ok(());
        };
        Err(TrainError::Config {
            origin: "run".into(),
            reason,
        })
    }

    fn parse(text: &str, overrides: &[String]) -> Result<Self, String> {
        let value: Value = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
        // With its defaults filled in, so that every key there is can be overridden.
        let config: Self = serde_json::from_value(value).map_err(|e| e.to_string())?;
        let mut value = serde_json::to_value(config).map_err(|e| e.to_string())?;
        for item in overrides {
            apply_override(&mut value, item)?;
        }
        serde_json::from_value(value).map_err(|e| e.to_string())
    }
}

/// Sets the value at `a.b.c` of `a.b.c=value`; the key must exist, so that a typing error is told.
fn apply_override(root: &mut Value, item: &str) -> Result<(), String> {
    let (key, text) = item
        .split_once('=')
        .ok_or_else(|| format!("override `{item}` is not of the form key.path=value"))?;
    let value: Value =
        serde_saphyr::from_str(text).map_err(|e| format!("override `{item}`: {e}"))?;
    let mut place = root;
    for part in key.split('.') {
        place = place
            .as_object_mut()
            .and_then(|map| map.get_mut(part))
            .ok_or_else(|| format!("override `{item}`: the configuration has no key `{key}`"))?;
    }
    *place = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_set_existing_keys_only() {
        let mut value = serde_json::json!({"run": {"seed": 1, "optimizer": {"lr": 0.1}}});
        apply_override(&mut value, "run.optimizer.lr=3e-4").unwrap();
        assert_eq!(value["run"]["optimizer"]["lr"], 3e-4);
        let error = apply_override(&mut value, "run.sed=2").unwrap_err();
        assert!(error.contains("run.sed"), "{error}");
        assert!(apply_override(&mut value, "run.seed").is_err());
    }

    #[test]
    fn the_learning_rate_starts_again() {
        let run = |last: &str| {
            let own = "run.warmup_steps=10 run.decay_steps=20 run.max_steps=100 run.optimizer.lr=1";
            let all = own.split(' ').chain([last]).map(str::to_owned);
            let config = RunConfig::shipped("miniature-stage1", &all.collect::<Vec<_>>());
            config.unwrap().run
        };
        let two = run("run.restarts=[60]");
        let rates = [5, 40, 50, 59, 60, 65, 80, 90].map(|step| two.learning_rate(step));
        assert_eq!(rates, [0.5, 1.0, 0.5, 0.05, 1.0, 1.0, 1.0, 0.5]);
        // Up to its restart, a run is the one that ends there: a finished one can be made longer.
        let one = run("run.max_steps=60");
        assert!((0..60).all(|step| one.learning_rate(step) == two.learning_rate(step)));
        let (beyond, none) = (run("run.restarts=[200]"), run("run.restarts=[]"));
        assert!((0..100).all(|step| beyond.learning_rate(step) == none.learning_rate(step)));
    }
}
