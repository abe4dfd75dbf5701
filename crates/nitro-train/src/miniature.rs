//! Everything that the shipped miniature consists of, from nothing: the autoencoder, the tokenizer
//! and text encoder, the cached latents, REPA's teacher, the E-MMDiT in two stages, and the model
//! folder at the end.

use std::collections::HashMap;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use nitro_models::emmdit::EmmditConfig;

use crate::TrainError;
use crate::autoencoder::{Autoencoder, shipped_config};
use crate::config::{CommonConfig, DataConfig, EmmditTask, RepaTask, RunConfig, TaskConfig};
use crate::emmdit::EmmditTraining;
use crate::export::save_shipped;
use crate::files::{check_writable, write_json};
use crate::language_model::LanguageModel;
use crate::preference::Preference;
use crate::store::ParameterStore;
use crate::trainer::{RunOptions, train};
use crate::visual_encoder::VisualEncoder;

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
/// An autoencoder exports `dc-ae/`, a language model `text_encoder/`, a visual encoder
/// `visual_encoder/`, an E-MMDiT `transformer.safetensors`, each as a Hub folder has it. Of several
/// processes, the first writes them.
pub fn run(
    config: &RunConfig,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    // What cannot go well is told before anything is loaded, computed or written.
    config.check(options.comm.size())?;
    if options.comm.rank() == 0 {
        check_writable(dir)?;
        check_writable(export)?;
    }
    run_task(config, dir, export, options)?;
    // What was exported is there for all.
    Ok(options.comm.wait()?)
}

fn run_task(
    config: &RunConfig,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    match &config.task {
        TaskConfig::Autoencoder(task) => {
            let training = Autoencoder::new(&config.run, task);
            let store = train(&training, config, dir, options)?;
            if options.comm.rank() != 0 {
                return Ok(());
            }
            let factor = training.scaling_factor(&store.averaged())?;
            let out = export.join("dc-ae");
            write_json(
                &out.join("config.json"),
                &shipped_config(&task.model, factor),
            )?;
            save_shipped(
                &store,
                &out.join("diffusion_pytorch_model.safetensors"),
                HashMap::new(),
            )
        }
        TaskConfig::LanguageModel(task) => {
            let out = export.join("text_encoder");
            let tokenizer =
                crate::tokenizer::train(config.run.seed, task.tokenizer_captions, task.vocab_size)?;
            let training = LanguageModel::new(&config.run, task, &tokenizer)?;
            let store = train(&training, config, dir, options)?;
            if options.comm.rank() != 0 {
                return Ok(());
            }
            crate::tokenizer::save(&tokenizer, &out)?;
            write_json(&out.join("config.json"), training.model())?;
            save_shipped(&store, &out.join("model.safetensors"), HashMap::new())
        }
        TaskConfig::VisualEncoder(task) => {
            let store = train(&VisualEncoder::new(&config.run, task), config, dir, options)?;
            if options.comm.rank() != 0 {
                return Ok(());
            }
            let out = export.join("visual_encoder");
            write_json(&out.join("config.json"), &task.model)?;
            save_shipped(&store, &out.join("model.safetensors"), HashMap::new())
        }
        TaskConfig::Emmdit(task) => {
            let training = EmmditTraining::new(&config.run, task)?;
            let store = train(&training, config, dir, options)?;
            match options.comm.rank() {
                0 => export_emmdit(&task.model, &store, &export.join("transformer.safetensors")),
                _ => Ok(()),
            }
        }
        TaskConfig::Preference(task) => {
            let store = train(&Preference::new(&config.run, task), config, dir, options)?;
            if options.comm.rank() != 0 {
                return Ok(());
            }
            let out = export.join("preference");
            let model = serde_json::json!({ "model_cfg": task.model });
            write_json(&out.join("open_clip_config.json"), &model)?;
            save_shipped(
                &store,
                &out.join("open_clip_model.safetensors"),
                HashMap::new(),
            )
        }
        TaskConfig::Lora(task) => crate::lora::run(config, task, dir, export, options),
        TaskConfig::Grpo(task) => crate::grpo::run(config, task, dir, export, options),
        TaskConfig::Distill(task) => crate::distill::run(config, task, dir, export, options),
    }
}

/// Writes the averaged weights of an E-MMDiT as a file of a model folder.
pub(crate) fn export_emmdit(
    model: &EmmditConfig,
    store: &ParameterStore,
    path: &Path,
) -> Result<(), TrainError> {
    let config = serde_json::to_string(model).map_err(|e| TrainError::Config {
        origin: "the model's configuration".into(),
        reason: e.to_string(),
    })?;
    let metadata = HashMap::from([("nitro.config".to_owned(), config)]);
    save_shipped(store, path, metadata)
}

/// The configurations of the miniature's runs, in order.
#[derive(Clone, Debug)]
pub struct Miniature {
    /// Trains the DC-AE.
    pub autoencoder: RunConfig,
    /// Trains the tokenizer and the text encoder.
    pub text_encoder: RunConfig,
    /// Trains REPA's teacher.
    pub teacher: RunConfig,
    /// Trains the E-MMDiT with REPA.
    pub stage1: RunConfig,
    /// Trains it further, from the first stage's average and without REPA.
    pub stage2: RunConfig,
    /// The cached pairs.
    pub latents: LatentsPlan,
}

impl Miniature {
    /// Reads `miniature-{autoencoder,text-encoder,teacher,stage1,stage2}.yaml` of `configs`.
    pub fn load(configs: &Path, latents: LatentsPlan) -> Result<Self, TrainError> {
        let read = |name: &str| RunConfig::load(&configs.join(name), &[]);
        Ok(Self {
            autoencoder: read("miniature-autoencoder.yaml")?,
            text_encoder: read("miniature-text-encoder.yaml")?,
            teacher: read("miniature-teacher.yaml")?,
            stage1: read("miniature-stage1.yaml")?,
            stage2: read("miniature-stage2.yaml")?,
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
        let latents = runs.join("latents");
        let precision = self.stage1.run.precision.into();
        cache_latents(out, &latents, self.latents, precision, options)?;
        let (teacher, stage1) = (runs.join("teacher"), runs.join("stage1"));
        let encoder = teacher.join("visual_encoder");
        if !encoder.join("model.safetensors").exists() {
            run(&self.teacher, &teacher, &teacher, options)?;
        }
        let first = placed(&self.stage1, &latents, out, Some(&encoder), None)?;
        run(&first, &stage1, &stage1.join("export"), options)?;
        let second = placed(&self.stage2, &latents, out, None, Some(&stage1))?;
        run(&second, &runs.join("stage2"), out, options)?;
        match &second.task {
            TaskConfig::Emmdit(task) if options.comm.rank() == 0 => {
                write_card(out, task.text_tokens, self.latents.image_size)
            }
            _ => Ok(()),
        }
    }
}

/// A stage's configuration with the folders of this recipe.
fn placed(
    stage: &RunConfig,
    latents: &Path,
    frozen: &Path,
    encoder: Option<&Path>,
    init_from: Option<&Path>,
) -> Result<RunConfig, TrainError> {
    let TaskConfig::Emmdit(task) = &stage.task else {
        return Err(TrainError::Config {
            origin: "a stage of the miniature".into(),
            reason: format!("task kind is {}, expected emmdit", stage.task.kind()),
        });
    };
    let mut task = EmmditTask {
        data: DataConfig::Latents {
            folder: latents.to_owned(),
        },
        frozen: Some(frozen.to_owned()),
        ..task.clone()
    };
    if let (Some(repa), Some(encoder)) = (&mut task.repa, encoder) {
        *repa = RepaTask {
            encoder: Some(encoder.to_owned()),
            ..repa.clone()
        };
    }
    Ok(RunConfig {
        run: CommonConfig {
            init_from: init_from.map(Path::to_owned),
            ..stage.run.clone()
        },
        task: TaskConfig::Emmdit(task),
    })
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
/// `frozen`. Several processes share the shards.
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
    let comm = options.comm.as_ref();
    let mine = nitro_comm::part(comm, shards);
    crate::latents::precompute(frozen, dir, seed, mine, image_size, precision, &bar)?;
    bar.finish();
    Ok(comm.wait()?)
}
