//! How a run begins: from nothing, from trained weights, or from its own newest checkpoint.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use burn::tensor::{Device, Tensor};
use nitro_comm::agree;
use nitro_models::{
    ParameterSource, ParameterSpec, Params, RandomInit, TensorMap, WeightError, WeightFiles,
};
use serde_json::json;

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::comm::{Comm, agree_on_weights};
use crate::config::RunConfig;
use crate::files::write_json;
use crate::store::ParameterStore;

/// Keys of a task that may change when a run is resumed. What data there are is told by the
/// fingerprint, not by where they lie.
const NOT_ESSENTIAL: [&str; 10] = [
    "full_size_steps",
    "eval",
    "collapse",
    "score_prompts",
    "sample_prompts",
    "grad_checkpointing",
    "data.datasets",
    "data.skip_damaged",
    "data.verify",
    "data.num_workers",
];

/// The newest checkpoint of `dir`, or a fresh start with the `initial` parameters. `data` tells what
/// data and frozen models the run has ([`Task::fingerprint`](crate::trainer::Task::fingerprint)).
///
/// Nothing is written before the folder's run is known to be this one, and all processes to see the
/// same.
pub(crate) fn start(
    config: &RunConfig,
    dir: &Path,
    data: &str,
    comm: &dyn Comm,
    initial: impl FnOnce() -> Result<ParameterStore, TrainError>,
) -> Result<Checkpoint, TrainError> {
    let text = serde_json::to_string(config).map_err(|e| TrainError::Config {
        origin: "the run's configuration".into(),
        reason: e.to_string(),
    })?;
    let state = match Checkpoint::latest(dir)? {
        Some((path, checkpoint)) => {
            check_resumable(&path, &checkpoint, config, data)?;
            Checkpoint {
                config: text,
                data: data.to_owned(),
                ..checkpoint
            }
        }
        None => Checkpoint {
            step: 0,
            updates: 0,
            config: text,
            data: data.to_owned(),
            store: initial()?,
        },
    };
    let sum = crc32c::crc32c(state.config.as_bytes());
    let text = format!("configuration {sum:08x} and data {data:?}");
    agree(comm, "configuration or data", &text)?;
    agree_on_weights(comm, state.step, &state.store)?;
    if comm.rank() == 0 {
        write_json(&dir.join("config.json"), config)?;
        note_start(dir, config, state.step, comm.size())?;
    }
    Ok(state)
}

/// The parameters that `build` asks for, as a run of `config` begins with them.
pub(crate) fn initial(
    config: &RunConfig,
    build: impl FnOnce(&Params<'_>) -> Result<(), TrainError>,
) -> Result<ParameterStore, TrainError> {
    match &config.run.init_from {
        Some(path) => initial_from(path, config.run.seed, build),
        None => ParameterStore::initialise(config.run.seed, build),
    }
}

/// Appends to `starts.jsonl` by what program and how this start was made.
fn note_start(dir: &Path, config: &RunConfig, step: u64, ranks: usize) -> Result<(), TrainError> {
    let path = dir.join("starts.jsonl");
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // The program's checksum tells two builds of one version apart.
    let program = std::env::current_exe()
        .and_then(std::fs::read)
        .map(|bytes| format!("{:08x}", crc32c::crc32c(&bytes)));
    let line = json!({
        "unix_time": now.unwrap_or_default().as_secs(), "step": step,
        "version": env!("CARGO_PKG_VERSION"), "program_crc32c": program.ok(),
        "seed": config.run.seed, "processes": ranks,
        "arguments": std::env::args().collect::<Vec<_>>(),
    });
    let mut text = std::fs::read_to_string(&path).unwrap_or_default();
    text += &format!("{line}\n");
    crate::files::write_whole(&path, text.as_bytes())
}

/// A run may be resumed with another length or other intervals, not as another model or with other
/// data or mathematics.
fn check_resumable(
    path: &Path,
    checkpoint: &Checkpoint,
    config: &RunConfig,
    data: &str,
) -> Result<(), TrainError> {
    let resume = |reason: String| TrainError::Resume {
        path: path.to_owned(),
        reason,
    };
    let old: RunConfig = serde_json::from_str(&checkpoint.config)
        .map_err(|e| resume(format!("its configuration cannot be read ({e})")))?;
    let essence = |config: &RunConfig| {
        let run = &config.run;
        let mut task = json!(config.task);
        // Parts of the schedule, like `max_steps`, what is watched, and how memory is spent.
        for key in NOT_ESSENTIAL {
            let (parent, key) = key.rsplit_once('.').unwrap_or(("", key));
            let parent = match parent {
                "" => Some(&mut task),
                parent => task.get_mut(parent),
            };
            if let Some(parent) = parent.and_then(|value| value.as_object_mut()) {
                parent.remove(key);
            }
        }
        json!({
            "task": task, "seed": run.seed, "init_from": run.init_from,
            "batch_size": run.batch_size, "optimizer": run.optimizer,
            "warmup_steps": run.warmup_steps, "gradient_clip": run.gradient_clip,
            "ema_rate": run.ema_rate, "precision": run.precision,
        })
    };
    let (old, new) = (essence(&old), essence(config));
    for (key, value) in old.as_object().into_iter().flatten() {
        if &new[key] != value {
            return Err(resume(format!(
                "`{key}` was {value} and is now {}; use another folder for another run",
                new[key]
            )));
        }
    }
    if !checkpoint.data.is_empty() && checkpoint.data != data {
        return Err(resume(format!(
            "it was trained on {} and would go on with {data}; bring the data back, or use another \
             folder for another run",
            checkpoint.data
        )));
    }
    Ok(())
}

/// The parameters that `build` asks for, with the weights of `path`: a run's folder or a checkpoint
/// (whose average is taken), or exported weights.
///
/// Only REPA's projectors may be missing, and are then initialised from `seed`: a stage without
/// REPA may follow one with it and the other way round.
fn initial_from(
    path: &Path,
    seed: u64,
    build: impl FnOnce(&Params<'_>) -> Result<(), TrainError>,
) -> Result<ParameterStore, TrainError> {
    let wrong = |reason: &str| TrainError::Config {
        origin: format!("run.init_from: {}", path.display()),
        reason: reason.to_owned(),
    };
    let weights = if path.is_dir() {
        let (_, checkpoint) = Checkpoint::latest(path)?.ok_or_else(|| {
            wrong("the folder holds no checkpoints/step-*.safetensors; train that run first")
        })?;
        Weights::Averaged(checkpoint.store.averaged())
    } else if path.exists() {
        let files = WeightFiles::open(path)?;
        match files.metadata().contains_key("nitro.step") {
            true => Weights::Averaged(Checkpoint::load(path)?.store.averaged()),
            false => Weights::Files(files),
        }
    } else {
        return Err(wrong("there is no such file or folder"));
    };
    let source = Trained {
        weights,
        fresh: RandomInit::new(seed),
    };
    ParameterStore::from_source(&source, build)
}

enum Weights {
    Averaged(TensorMap),
    Files(WeightFiles),
}

struct Trained {
    weights: Weights,
    fresh: RandomInit,
}

impl Trained {
    fn source(&self) -> &dyn ParameterSource {
        match &self.weights {
            Weights::Averaged(map) => map,
            Weights::Files(files) => files,
        }
    }
}

impl ParameterSource for Trained {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let projector = spec.name.starts_with("projectors.");
        if projector && !self.source().contains(&spec.name) {
            return self.fresh.parameter(spec, device);
        }
        self.source().parameter(spec, device)
    }

    fn contains(&self, name: &str) -> bool {
        self.source().contains(name)
    }
}
