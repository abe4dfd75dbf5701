//! Everything that the shipped miniature consists of, from nothing: the autoencoder, the tokenizer
//! and text encoder, the cached latents, the E-MMDiT, and the model folder at the end.

use std::collections::HashMap;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use nitro_models::{DType, save_safetensors};

use crate::TrainError;
use crate::autoencoder::{Autoencoder, shipped_config};
use crate::config::{EmmditTask, RunConfig, TaskConfig};
use crate::emmdit::EmmditTraining;
use crate::files::write_json;
use crate::language_model::{LanguageModel, RECALL};
use crate::store::ParameterStore;
use crate::trainer::{RunOptions, train};

/// Number of cached pairs, and the size of their pictures.
#[derive(Clone, Copy, Debug)]
pub struct LatentsPlan {
    /// Shards of [`crate::latents::SHARD`] pairs.
    pub shards: usize,
    /// Side of the pictures.
    pub image_size: usize,
    /// Seed of the pairs.
    pub seed: u64,
}

/// Runs the configuration `config` in `dir`; what it exports goes to `export`.
///
/// An autoencoder exports `dc-ae/`, a language model `text_encoder/`, an E-MMDiT
/// `transformer.safetensors`, each as a Hub folder has it.
pub fn run(
    config: &RunConfig,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    match &config.task {
        TaskConfig::Autoencoder(task) => {
            let training = Autoencoder::new(&config.run, task);
            let store = train(&training, config, dir, options)?;
            let factor = training.scaling_factor(&store.averaged())?;
            let out = export.join("dc-ae");
            write_json(
                &out.join("config.json"),
                &shipped_config(&task.model, factor),
            )?;
            save(
                &store,
                &out.join("diffusion_pytorch_model.safetensors"),
                HashMap::new(),
            )
        }
        TaskConfig::LanguageModel(task) => {
            let out = export.join("text_encoder");
            let tokenizer =
                crate::tokenizer::train(config.run.seed, task.tokenizer_captions, task.vocab_size)?;
            let training = LanguageModel::new(&config.run, task, &tokenizer);
            let store = train(&training, config, dir, options)?;
            crate::tokenizer::save(&tokenizer, &out)?;
            write_json(&out.join("config.json"), training.model())?;
            save(&store, &out.join("model.safetensors"), HashMap::new())
        }
        TaskConfig::Emmdit(task) => {
            let training = EmmditTraining::new(&config.run, task)?;
            let store = train(&training, config, dir, options)?;
            export_emmdit(task, &store, export)
        }
    }
}

/// Writes the averaged weights of an E-MMDiT as `transformer.safetensors` of a model folder.
fn export_emmdit(
    task: &EmmditTask,
    store: &ParameterStore,
    export: &Path,
) -> Result<(), TrainError> {
    let config = serde_json::to_string(&task.model).map_err(|e| TrainError::Config {
        origin: "the model's configuration".into(),
        reason: e.to_string(),
    })?;
    let metadata = HashMap::from([("nitro.config".to_owned(), config)]);
    save(store, &export.join("transformer.safetensors"), metadata)
}

fn save(
    store: &ParameterStore,
    path: &Path,
    metadata: HashMap<String, String>,
) -> Result<(), TrainError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|source| TrainError::Io {
            path: parent.to_owned(),
            source,
        })?;
    }
    let tensors: Vec<_> = store
        .iter()
        .filter(|(name, entry)| entry.trainable && !name.starts_with(RECALL))
        .map(|(name, entry)| (name.to_owned(), entry.shape.clone(), entry.averaged()))
        .collect();
    Ok(save_safetensors(path, &tensors, &metadata, DType::F16)?)
}

/// The configurations of the miniature's runs, in order.
#[derive(Clone, Debug)]
pub struct Miniature {
    /// Trains the DC-AE.
    pub autoencoder: RunConfig,
    /// Trains the tokenizer and the text encoder.
    pub text_encoder: RunConfig,
    /// Trains the E-MMDiT.
    pub emmdit: RunConfig,
    /// The cached pairs.
    pub latents: LatentsPlan,
}

impl Miniature {
    /// Reads `miniature-{autoencoder,text-encoder,emmdit}.yaml` of `configs`.
    pub fn load(configs: &Path, latents: LatentsPlan) -> Result<Self, TrainError> {
        let read = |name: &str| RunConfig::load(&configs.join(name), &[]);
        Ok(Self {
            autoencoder: read("miniature-autoencoder.yaml")?,
            text_encoder: read("miniature-text-encoder.yaml")?,
            emmdit: read("miniature-emmdit.yaml")?,
            latents,
        })
    }

    /// Trains what is not yet trained in `runs`, and writes the model folder `out`. Killed and
    /// started again, it goes on where it was.
    pub fn train(&self, runs: &Path, out: &Path, options: &RunOptions) -> Result<(), TrainError> {
        let done = |file: &str| out.join(file).exists();
        if !done("dc-ae/diffusion_pytorch_model.safetensors") {
            run(&self.autoencoder, &runs.join("autoencoder"), out, options)?;
        }
        if !done("text_encoder/model.safetensors") {
            run(&self.text_encoder, &runs.join("text-encoder"), out, options)?;
        }
        let TaskConfig::Emmdit(task) = &self.emmdit.task else {
            return Err(TrainError::Config {
                origin: "miniature-emmdit.yaml".into(),
                reason: format!("task kind is {}, expected emmdit", self.emmdit.task.kind()),
            });
        };
        let latents = runs.join("latents");
        cache_latents(
            out,
            &latents,
            self.latents,
            self.emmdit.run.precision.into(),
            options,
        )?;
        let text_tokens = task.text_tokens;
        let task = EmmditTask {
            latents,
            frozen: out.to_owned(),
            ..task.clone()
        };
        let config = RunConfig {
            task: TaskConfig::Emmdit(task),
            ..self.emmdit.clone()
        };
        run(&config, &runs.join("emmdit"), out, options)?;
        write_card(out, text_tokens, self.latents.image_size)
    }
}

/// Writes `nitro.json`, by which a model folder is loaded (`nitro_pipeline::ModelCard`).
fn write_card(out: &Path, text_tokens: usize, resolution: usize) -> Result<(), TrainError> {
    let base = serde_json::json!({
        "name": "base", "resolution": resolution, "transformer": "transformer.safetensors",
        "steps": crate::emmdit::STEPS, "guidance": crate::emmdit::GUIDANCE,
    });
    let card = serde_json::json!({
        "format": 1, "name": "nitro-miniature", "text_tokens": text_tokens, "variants": [base],
    });
    write_json(&out.join("nitro.json"), &card)
}

/// Writes the cached pairs that are missing in `dir`, with the autoencoder of the model folder
/// `frozen`.
pub fn cache_latents(
    frozen: &Path,
    dir: &Path,
    plan: LatentsPlan,
    precision: nitro_ops::Precision,
    options: &RunOptions,
) -> Result<(), TrainError> {
    let bar = if options.quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(0)
    };
    if let Ok(style) = ProgressStyle::with_template("latents {bar:24} {pos}/{len} eta {eta}") {
        bar.set_style(style);
    }
    let LatentsPlan {
        shards,
        image_size,
        seed,
    } = plan;
    crate::latents::precompute(frozen, dir, seed, shards, image_size, precision, &bar)?;
    bar.finish();
    Ok(())
}
