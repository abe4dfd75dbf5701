//! Step distillation: a student of a few steps and no guidance from a teacher of many.
//!
//! The teacher paints the data ([`pairs`]); the student starts from its weights and learns, at the
//! noise levels of its own steps, to give the teacher's clean latents ([`student`]), and to deceive a
//! [`discriminator`] made of the frozen teacher's features and small random heads. Sources: Nitro-1
//! (AMD-AIG-AIMA/AMD-Diffusion-Distillation), LADD (arXiv 2403.12015), Nitro-E (arXiv 2510.27135).

mod config;
mod discriminator;
mod pairs;
mod student;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use nitro_diffusion::schedule::FlowMatchEuler;
use nitro_models::emmdit::Emmdit;
use nitro_pipeline::Variant;
use serde_json::{Value, json};

pub use self::config::{
    AdversarialConfig, AdversarialLoss, DiscriminatorConfig, DistillTask, PairsConfig,
    ReconstructionConfig, ReconstructionLoss, Selection,
};

use self::discriminator::{Heads, PREFIX};
use self::pairs::Pairs;
use self::student::{Critic, Distiller, Report};
use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::comm::Single;
use crate::config::{CommonConfig, RunConfig};
use crate::frozen::{Frozen, Sampling, register};
use crate::miniature::export_emmdit;
use crate::pictures::write_pictures;
use crate::progress::Log;
use crate::prompts::Prompts;
use crate::rewards::{Rewards, Sample, mean_and_spread};
use crate::start::start;
use crate::store::ParameterStore;
use crate::trainer::RunOptions;

/// Steps in a row whose gradient is not finite that end a run.
const MAX_SKIPPED: u64 = 50;
/// The exported weights.
const FILE: &str = "transformer-dist.safetensors";

/// Paints what pairs are missing, runs `task` in `dir` from its newest checkpoint if there is one, and
/// writes the averaged student into `export`, with its variant `dist` in `nitro.json` if that is there.
pub fn run(
    config: &RunConfig,
    task: &DistillTask,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    for folder in [dir, export] {
        std::fs::create_dir_all(folder).map_err(|source| TrainError::Io {
            path: folder.to_owned(),
            source,
        })?;
    }
    let run = &config.run;
    let frozen = Frozen::open(&task.model, Some(&task.variant), run.precision.into())?;
    task.check(run, frozen.config.blocks())?;
    let prompts = Prompts::open(&task.prompts)?;
    let bar = pairs_bar(&task.pairs, options.quiet);
    let stop = || options.stop.is_some_and(|s| s.load(Ordering::Relaxed));
    let rewards = Rewards::open(&task.rewards)?;
    pairs::Studio {
        config: &task.pairs,
        frozen: &frozen,
        prompts: &prompts,
        rewards: &rewards,
        seed: run.seed,
        bar: &bar,
        stop: &stop,
    }
    .synthesize()?;
    bar.finish_and_clear();
    let pairs = Pairs::open(&task.pairs, &frozen, run.seed)?;

    let mut state = start(config, dir, "", &Single, || {
        initial(&frozen, task, run.seed)
    })?;
    let training = Training {
        distiller: Distiller {
            frozen: &frozen,
            teacher: frozen.constant()?,
            pairs: &pairs,
            timetable: FlowMatchEuler::nitro_e().timetable(task.steps)?,
            task,
            run,
        },
        rewards,
        prompts,
    };
    training.train(config, &mut state, dir, options)?;
    export_emmdit(
        &frozen.config,
        &state.store.without(PREFIX),
        &export.join(FILE),
    )?;
    register(
        export,
        Variant {
            name: "dist".into(),
            transformer: FILE.into(),
            lora: None,
            steps: task.eval.steps,
            guidance: task.eval.guidance.into(),
            ..frozen.pipeline.variant().clone()
        },
    )
}

/// The teacher's weights, and fresh heads.
fn initial(frozen: &Frozen, task: &DistillTask, seed: u64) -> Result<ParameterStore, TrainError> {
    let mut store = ParameterStore::from_source(&frozen.parameters, |p| {
        Emmdit::new(&frozen.config, p).map(drop)
    })?;
    store.extend(ParameterStore::initialise(seed, |p| {
        Heads::new(&task.discriminator, frozen.config.width(), p).map(drop)
    })?);
    Ok(store)
}

fn pairs_bar(config: &PairsConfig, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new((config.shards * config.shard_size) as u64);
    if let Ok(style) =
        ProgressStyle::with_template("teacher's pairs {bar:24} {pos}/{len} eta {eta}")
    {
        bar.set_style(style);
    }
    bar
}

struct Training<'a> {
    distiller: Distiller<'a>,
    rewards: Rewards,
    prompts: Prompts,
}

impl Training<'_> {
    fn train(
        &self,
        config: &RunConfig,
        state: &mut Checkpoint,
        dir: &Path,
        options: &RunOptions,
    ) -> Result<(), TrainError> {
        let (run, task) = (&config.run, self.distiller.task);
        let mut log = Log::open(dir, state.step, run, true, options.quiet)?;
        log.say(format!(
            "distill: {:.2}M parameters with heads, {} pairs, from step {}",
            state.store.trainable_count() as f64 / 1e6,
            self.distiller.pairs.len(),
            state.step
        ));
        let samples = dir.join("samples");
        if state.step == 0 && task.eval.every > 0 {
            let eval = self.evaluate(run, state, Some(&samples))?;
            log.write(&json!({ "step": 0, "eval": eval }))?;
        }
        let mut skipped = 0;
        let mut meter = Meter::new();
        while state.step < run.max_steps {
            let lr = run.learning_rate(state.step);
            let report = self.distiller.step(state, lr)?;
            state.step += 1;
            skipped = if report.applied { 0 } else { skipped + 1 };
            if skipped >= MAX_SKIPPED {
                return Err(TrainError::NotFinite {
                    steps: skipped,
                    step: state.step,
                });
            }
            meter.add(report);
            log.position(state.step);
            let due = |every: u64| {
                every > 0 && (state.step.is_multiple_of(every) || state.step == run.max_steps)
            };
            let measured = due(task.eval.every);
            if due(run.log_every) || measured {
                let mut line = meter.take(state.step, lr, run.batch_size);
                log.message(format!(
                    "{:.4}",
                    line["reconstruction"].as_f64().unwrap_or(0.0)
                ));
                if measured {
                    let grid = due(run.sample_every).then_some(samples.as_path());
                    line["eval"] = self.evaluate(run, state, grid)?;
                }
                log.write(&line)?;
            }
            let asked = options.stop.is_some_and(|s| s.load(Ordering::Relaxed));
            if due(run.save_every) || asked {
                state.save(dir, run.keep)?;
            }
            if asked && state.step < run.max_steps {
                log.finish(false);
                return Err(TrainError::Interrupted { step: state.step });
            }
        }
        log.finish(true);
        Ok(())
    }

    /// Rewards of held-out prompts' pictures by the averaged student, and a grid of the first.
    fn evaluate(
        &self,
        run: &CommonConfig,
        state: &Checkpoint,
        samples: Option<&Path>,
    ) -> Result<Value, TrainError> {
        let (frozen, eval) = (self.distiller.frozen, self.distiller.task.eval);
        let parameters = state.store.averaged();
        let model = frozen.with(&parameters)?;
        let prompts = self.prompts.held_out(eval.prompts);
        let texts: Vec<&str> = prompts.iter().map(|p| p.prompt.as_str()).collect();
        let seeds: Vec<u64> = (0..texts.len() as u64).collect();
        let how = Sampling {
            steps: eval.steps,
            guidance: eval.guidance,
            batch: run.batch_size,
        };
        let pictures = frozen.decode(&frozen.sample(&model, &texts, &seeds, how)?)?;
        if let Some(dir) = samples {
            std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
                path: dir.to_owned(),
                source,
            })?;
            let grid: Vec<_> = pictures.iter().take(24).collect();
            write_pictures(&dir.join(format!("step-{:08}.png", state.step)), &grid, 8)?;
        }
        let samples: Vec<Sample<'_>> = prompts
            .iter()
            .zip(&pictures)
            .map(|(metadata, picture)| Sample { metadata, picture })
            .collect();
        let scores = self.rewards.score(&samples)?;
        let mut json = json!({ "reward": mean_and_spread(&scores.total).0 });
        for (name, values) in &scores.parts {
            json[name] = json!(mean_and_spread(values).0);
        }
        Ok(json)
    }
}

/// Averages between two lines of the log.
struct Meter {
    since: Instant,
    reports: Vec<Report>,
}

impl Meter {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            reports: Vec::new(),
        }
    }

    fn add(&mut self, report: Report) {
        self.reports.push(report);
    }

    fn take(&mut self, step: u64, lr: f64, batch: usize) -> Value {
        let reports = std::mem::replace(self, Self::new());
        let seconds = reports.since.elapsed().as_secs_f64();
        let reports = reports.reports;
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let over = |of: fn(&Report) -> f64| mean(reports.iter().map(of).collect());
        let mut line = json!({
            "step": step,
            "lr": lr,
            "reconstruction": over(|r| r.reconstruction),
            "adversarial": over(|r| r.adversarial),
            "grad_norm": over(|r| r.grad_norm),
            "images_per_second": reports.len() as f64 * batch as f64 / seconds,
        });
        let critics: Vec<Critic> = reports.iter().filter_map(|r| r.critic).collect();
        if critics.is_empty() {
            return line;
        }
        let over = |of: fn(&Critic) -> f64| mean(critics.iter().map(of).collect());
        let (real, fake) = (over(|c| c.real.0), over(|c| c.fake.0));
        line["discriminator"] = json!({
            "loss": over(|c| c.loss),
            "grad_norm": over(|c| c.grad_norm),
            "real": { "right": real, "logit": over(|c| c.real.1) },
            "fake": { "right": fake, "logit": over(|c| c.fake.1) },
            "misaligned": { "right": over(|c| c.misaligned.0), "logit": over(|c| c.misaligned.1) },
            "health": health(real, fake),
        });
        line
    }
}

/// How the discriminator does: of use to the student while it is neither always right nor guessing.
fn health(real: f64, fake: f64) -> &'static str {
    let right = (real + fake) / 2.0;
    match right {
        right if right > 0.97 => "too strong: lower discriminator.lr or raise discriminator.noise",
        right if right < 0.53 => "too weak: raise discriminator.lr or discriminator.hidden",
        _ => "balanced",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_discriminators_health_is_told() {
        assert!(health(0.99, 0.99).starts_with("too strong"));
        assert!(health(0.9, 0.1).starts_with("too weak"));
        assert_eq!(health(0.7, 0.8), "balanced");
    }
}
