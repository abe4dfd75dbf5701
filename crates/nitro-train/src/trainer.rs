//! The loop that every run goes through: batch, loss, gradient, step; progress, samples, checkpoints.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use indicatif::{ProgressBar, ProgressStyle};
use nitro_models::{Params, TensorMap};
use serde_json::json;

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::config::{CommonConfig, RunConfig};
use crate::files::write_json;
use crate::optimizer::{learning_rate, named_gradients, step};
use crate::start::initial_from;
use crate::store::ParameterStore;

/// Steps with a gradient that is not finite, in a row, that end a run.
const MAX_SKIPPED: u64 = 50;

/// What a training step minimises, and what it reports.
pub struct Losses {
    /// The loss, one element.
    pub total: Tensor<1>,
    /// Named parts for the log.
    pub parts: Vec<(&'static str, f64)>,
}

/// A model with its data and loss.
pub trait Task {
    /// The examples of one step.
    type Batch;

    /// Asks `p` for every parameter of the model.
    fn build(&self, p: &Params<'_>) -> Result<(), TrainError>;

    /// The examples of `step`: a function of the seed and the step alone, so that a resumed run sees
    /// what the run it goes on from would have seen.
    fn batch(&self, step: u64) -> Result<Self::Batch, TrainError>;

    /// The loss of the model with parameters `p` on `batch`.
    fn loss(&self, p: &Params<'_>, batch: Self::Batch) -> Result<Losses, TrainError>;

    /// Writes what the averaged weights make into `dir`, under a name that tells the step.
    fn sample(&self, averaged: &TensorMap, step: u64, dir: &Path) -> Result<(), TrainError>;
}

/// How a run talks and when it stops.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// No progress bar.
    pub quiet: bool,
    /// Set from outside (Ctrl-C): the run writes a checkpoint and stops after the step in hand.
    pub stop: Option<&'static AtomicBool>,
}

/// Trains `task` as `config` says in `dir`, from its newest checkpoint if there is one, and returns
/// the parameters at the end.
pub fn train<T: Task>(
    task: &T,
    config: &RunConfig,
    dir: &Path,
    options: &RunOptions,
) -> Result<ParameterStore, TrainError> {
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let common = &config.run;
    let mut state = start(config, dir, || match &config.run.init_from {
        Some(path) => initial_from(path, config.run.seed, |p| task.build(p)),
        None => ParameterStore::initialise(config.run.seed, |p| task.build(p)),
    })?;
    let mut log = MetricsLog::open(dir)?;
    let bar = progress_bar(common, state.step, options.quiet);
    bar.println(format!(
        "{}: {:.2}M parameters, {} steps of {} from step {}",
        config.task.kind(),
        state.store.trainable_count() as f64 / 1e6,
        common.max_steps,
        common.batch_size,
        state.step
    ));
    let samples = dir.join("samples");
    if common.sample_every > 0 && state.step == 0 {
        sample(task, &state.store, 0, &samples)?;
    }
    let mut meter = Meter::new();
    let mut skipped = 0;
    while state.step < common.max_steps {
        let begun = Instant::now();
        let batch = task.batch(state.step)?;
        meter.data += begun.elapsed();

        let tensors = state.store.tracked();
        let device = burn::tensor::Device::flex().autodiff();
        let losses = task.loss(
            &Params::new(&tensors, &device, common.precision.into()),
            batch,
        )?;
        let total = f64::from(losses.total.clone().into_scalar::<f32>());
        let gradients = named_gradients(&tensors, &state.store, losses.total.backward());
        let lr = learning_rate(
            common.optimizer.lr,
            state.step,
            common.max_steps,
            common.warmup_steps,
            common.decay_steps,
        );
        let report = step(
            &mut state.store,
            &gradients,
            &common.optimizer,
            lr,
            state.updates + 1,
            common.gradient_clip,
            common.ema_rate,
        )?;
        state.step += 1;
        if report.applied {
            state.updates += 1;
            skipped = 0;
            meter.add(total, &losses.parts, report.grad_norm);
        } else {
            skipped += 1;
            if skipped >= MAX_SKIPPED {
                return Err(TrainError::NotFinite {
                    steps: skipped,
                    step: state.step,
                });
            }
        }
        bar.set_position(state.step);
        if state.step % common.log_every == 0 || state.step == common.max_steps {
            let line = meter.take(state.step, lr, common.batch_size);
            bar.set_message(line.message);
            log.write(&line.json)?;
        }
        let stop = options
            .stop
            .is_some_and(|flag| flag.load(Ordering::Relaxed));
        if state.step % common.save_every == 0 || state.step == common.max_steps || stop {
            state.save(dir, common.keep)?;
        }
        if common.sample_every > 0
            && (state.step % common.sample_every == 0 || state.step == common.max_steps)
        {
            sample(task, &state.store, state.step, &samples)?;
        }
        if stop && state.step < common.max_steps {
            bar.abandon();
            return Err(TrainError::Interrupted { step: state.step });
        }
    }
    bar.finish();
    Ok(state.store)
}

/// The newest checkpoint of `dir`, or a fresh start with the `initial` parameters.
pub(crate) fn start(
    config: &RunConfig,
    dir: &Path,
    initial: impl FnOnce() -> Result<ParameterStore, TrainError>,
) -> Result<Checkpoint, TrainError> {
    let text = serde_json::to_string(config).map_err(|e| TrainError::Config {
        origin: "the run's configuration".into(),
        reason: e.to_string(),
    })?;
    if let Some((path, checkpoint)) = Checkpoint::latest(dir)? {
        check_resumable(&path, &checkpoint, config)?;
        return Ok(Checkpoint {
            config: text,
            ..checkpoint
        });
    }
    write_json(&dir.join("config.json"), config)?;
    Ok(Checkpoint {
        step: 0,
        updates: 0,
        config: text,
        store: initial()?,
    })
}

/// A run may be resumed with another length or other intervals, not as another model or with other
/// data or mathematics.
fn check_resumable(
    path: &Path,
    checkpoint: &Checkpoint,
    config: &RunConfig,
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
        // Part of the schedule, like `max_steps`, or what is watched on the way.
        for key in ["full_size_steps", "eval", "collapse"] {
            task.as_object_mut().map(|task| task.remove(key));
        }
        json!({
            "task": task, "seed": run.seed, "init_from": run.init_from, "batch_size": run.batch_size,
            "optimizer": run.optimizer, "warmup_steps": run.warmup_steps,
            "gradient_clip": run.gradient_clip, "ema_rate": run.ema_rate,
            "precision": run.precision,
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
    Ok(())
}

fn sample<T: Task>(
    task: &T,
    store: &ParameterStore,
    step: u64,
    dir: &Path,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })?;
    task.sample(&store.averaged(), step, dir)
}

pub(crate) fn progress_bar(config: &CommonConfig, position: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(config.max_steps).with_position(position);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} eta {eta}") {
        bar.set_style(style);
    }
    bar.reset_eta();
    bar
}

/// Averages between two lines of the log.
struct Meter {
    since: Instant,
    data: Duration,
    steps: u64,
    loss: f64,
    norm: f64,
    parts: Vec<(&'static str, f64)>,
}

struct Line {
    message: String,
    json: serde_json::Value,
}

impl Meter {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            data: Duration::ZERO,
            steps: 0,
            loss: 0.0,
            norm: 0.0,
            parts: Vec::new(),
        }
    }

    fn add(&mut self, loss: f64, parts: &[(&'static str, f64)], norm: f64) {
        self.steps += 1;
        self.loss += loss;
        self.norm += norm;
        if self.parts.is_empty() {
            self.parts = parts.to_vec();
        } else {
            for (sum, part) in self.parts.iter_mut().zip(parts) {
                sum.1 += part.1;
            }
        }
    }

    fn take(&mut self, step: u64, lr: f64, batch: usize) -> Line {
        let n = self.steps.max(1) as f64;
        let seconds = self.since.elapsed().as_secs_f64();
        let speed = self.steps as f64 * batch as f64 / seconds;
        let mut json = json!({
            "step": step, "loss": self.loss / n, "grad_norm": self.norm / n, "lr": lr,
            "images_per_second": speed,
            "data_share": self.data.as_secs_f64() / seconds,
        });
        for (name, sum) in &self.parts {
            json[*name] = json!(sum / n);
        }
        let message = format!("loss {:.4} lr {lr:.1e} {speed:.1}/s", self.loss / n);
        *self = Self::new();
        Line { message, json }
    }
}

/// `metrics.jsonl`, one object per line, appended.
pub(crate) struct MetricsLog {
    path: PathBuf,
    file: std::fs::File,
}

impl MetricsLog {
    pub(crate) fn open(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join("metrics.jsonl");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|source| TrainError::Io {
                path: path.clone(),
                source,
            })?;
        Ok(Self { path, file })
    }

    pub(crate) fn write(&mut self, line: &serde_json::Value) -> Result<(), TrainError> {
        writeln!(self.file, "{line}").map_err(|source| TrainError::Io {
            path: self.path.clone(),
            source,
        })
    }
}
