//! Group-relative policy optimisation (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818) of
//! a flow-matching model's adapters.
//!
//! Each step paints groups of pictures of the same prompts with a stochastic sampler ([`rollout`]),
//! scores them ([`crate::rewards`]), compares each with the others of its group ([`advantage`]), and
//! makes likelier what was better ([`objective`], [`update`]). [`collapse`] ends a run that is being
//! lost. Everything random is a function of the run's seed and the step, so a run resumes exactly.

mod advantage;
mod collapse;
mod config;
mod forward;
mod objective;
mod report;
mod rollout;
mod update;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use burn::tensor::Device;
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use nitro_pipeline::Variant;
use serde_json::{Value, json};

pub use self::config::{
    AdvantageStd, CollapseConfig, EvalConfig, GrpoTask, ObjectiveConfig, TimestepChoice, Window,
};

use self::advantage::advantages;
use self::collapse::{History, Vitals};
use self::forward::Forward;
use self::rollout::{Rollout, Studio};
use self::update::{Learner, Updates};
use crate::TrainError;
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::comm::Single;
use crate::config::{CommonConfig, RunConfig};
use crate::frozen::{Frozen, Sampling, register};
use crate::progress::Log;
use crate::prompts::Prompts;
use crate::rewards::{Rewards, Sample, mean_and_spread};
use crate::start::start;
use crate::trainer::RunOptions;

/// The buffer of a checkpoint that holds the vitals of all rollouts.
const HISTORY: &str = "history";

/// Runs `task` in `dir`, from its newest checkpoint if there is one, and writes the averaged adapter
/// as the folder `grpo` of `export`, with its variant in `nitro.json` if that is there.
pub fn run(
    config: &RunConfig,
    task: &GrpoTask,
    dir: &Path,
    export: &Path,
    options: &RunOptions,
) -> Result<(), TrainError> {
    task.check(&config.run)?;
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let frozen = Frozen::open(
        &task.model,
        Some(&task.variant),
        config.run.precision.into(),
    )?;
    let training = Training {
        adapter: Adapter::new(&task.lora, &frozen.parameters)?,
        prompts: Prompts::open(&task.prompts)?,
        rewards: Rewards::open(&task.rewards)?,
        frozen,
        run: &config.run,
        task,
    };
    let mut state = start(config, dir, "", &Single, || {
        training.adapter.initial(config)
    })?;
    training.train(&mut state, dir, options)?;

    let name = "grpo";
    let base = format!("{} ({})", task.model, task.variant);
    training
        .adapter
        .export(&state.store, &export.join(name), &base)?;
    register(export, training.variant(name))
}

struct Training<'a> {
    frozen: Frozen,
    adapter: Adapter,
    prompts: Prompts,
    rewards: Rewards,
    run: &'a CommonConfig,
    task: &'a GrpoTask,
}

impl Training<'_> {
    fn train(
        &self,
        state: &mut Checkpoint,
        dir: &Path,
        options: &RunOptions,
    ) -> Result<(), TrainError> {
        let run = self.run;
        let mut history = match state.store.get(HISTORY) {
            Some(entry) => History::from_buffer(&entry.value),
            None => History::default(),
        };
        let mut log = Log::open(dir, state.step, run, true, options.quiet)?;
        log.say(format!(
            "grpo: {:.2}M parameters in adapters, rollouts of {} x {} samples, from step {}",
            state.store.trainable_count() as f64 / 1e6,
            self.task.groups,
            self.task.group_size,
            state.step
        ));
        if state.step == 0 && self.task.eval.every > 0 {
            let scores = self.evaluate(state)?;
            log.write(&json!({ "step": 0, "eval": scores }))?;
        }
        while state.step < run.max_steps {
            let lr = run.learning_rate(state.step);
            let policy = self.policy(&match self.task.objective {
                ObjectiveConfig::Likelihood => state.store.current(),
                ObjectiveConfig::Forward { .. } => state.store.averaged(),
            })?;
            let studio = Studio {
                frozen: &self.frozen,
                task: self.task,
                prompts: &self.prompts,
                rewards: &self.rewards,
                seed: run.seed,
                batch_size: run.batch_size,
            };
            let rollout = studio.rollout(&policy, state.step)?;
            let advantages = advantages(
                &rollout.scores.total,
                self.task.groups,
                self.task.advantage_std,
                self.task.advantage_clip,
            );
            let learner = Learner {
                frozen: &self.frozen,
                adapter: &self.adapter,
                task: self.task,
                run,
            };
            let begun = Instant::now();
            let updates = match self.task.objective {
                ObjectiveConfig::Likelihood => {
                    learner.learn(state, &rollout, &advantages.values, lr)?
                }
                ObjectiveConfig::Forward {
                    beta,
                    levels,
                    draws,
                } => Forward {
                    learner: &learner,
                    old: &policy,
                    beta,
                    levels,
                    draws,
                }
                .learn(state, &rollout, &advantages.values, lr)?,
            };
            let seconds = begun.elapsed().as_secs_f64();
            state.step += 1;

            let vitals = Vitals {
                reward: mean_and_spread(&rollout.scores.total).0,
                zero_spread: advantages.zero_spread,
                diversity: rollout.diversity(),
                kl: updates.sums.kl / updates.sums.kl_samples.max(1.0),
            };
            history.push(vitals);
            state.store.set_buffer(HISTORY, history.to_buffer());
            let due = |every: u64| {
                every > 0 && (state.step.is_multiple_of(every) || state.step == run.max_steps)
            };
            let mut line = metrics(state.step, &rollout, &vitals, &updates, lr);
            line["group_spread"] = json!(advantages.spread);
            line["seconds"] = json!({
                "rollout": rollout.seconds.0, "rewards": rollout.seconds.1, "training": seconds,
            });
            if due(self.task.eval.every) {
                line["eval"] = self.evaluate(state)?;
            }
            log.position(state.step);
            log.message(format!("reward {:.3} kl {:.1e}", vitals.reward, vitals.kl));
            if due(run.log_every) || line.get("eval").is_some() {
                log.write(&line)?;
            }
            if due(run.sample_every) {
                report::write_extremes(&rollout, state.step, &dir.join("samples"))?;
            }
            // A ruined policy does not take the place of the last good checkpoint.
            if let Some(reason) = history.collapsed(&self.task.collapse) {
                log.write(&line)?;
                let step = state.step;
                return Err(TrainError::Collapsed { step, reason });
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

    /// The model with an adapter of these parameters, without gradients.
    fn policy(&self, parameters: &TensorMap) -> Result<nitro_models::emmdit::Emmdit, TrainError> {
        let params = Params::new(parameters, &Device::flex(), Precision::F32);
        self.frozen.adapted(&self.adapter.build(&params)?)
    }

    /// Rewards of held-out prompts' pictures by the averaged adapter, as it would be used.
    fn evaluate(&self, state: &Checkpoint) -> Result<Value, TrainError> {
        let EvalConfig {
            prompts,
            steps,
            guidance,
            ..
        } = self.task.eval;
        let model = self.policy(&state.store.averaged())?;
        let prompts = self.prompts.held_out(prompts);
        let texts: Vec<&str> = prompts.iter().map(|p| p.prompt.as_str()).collect();
        let seeds: Vec<u64> = (0..texts.len() as u64).collect();
        let how = Sampling {
            steps,
            guidance,
            batch: self.run.batch_size,
        };
        let pictures = self
            .frozen
            .decode(&self.frozen.sample(&model, &texts, &seeds, how)?)?;
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

    fn variant(&self, name: &str) -> Variant {
        let base = self.frozen.pipeline.variant();
        Variant {
            name: name.into(),
            lora: Some(name.into()),
            steps: self.task.eval.steps,
            guidance: self.task.eval.guidance.into(),
            ..base.clone()
        }
    }
}

/// One line of `metrics.jsonl`.
fn metrics(step: u64, rollout: &Rollout, vitals: &Vitals, updates: &Updates, lr: f64) -> Value {
    let (reward, spread) = mean_and_spread(&rollout.scores.total);
    let samples = updates.sums.samples.max(1.0);
    let scorers: serde_json::Map<String, Value> = rollout
        .scores
        .parts
        .iter()
        .map(|(name, values)| {
            let (mean, spread) = mean_and_spread(values);
            (name.clone(), json!({ "mean": mean, "spread": spread }))
        })
        .collect();
    json!({
        "step": step,
        "reward": reward,
        "reward_spread": spread,
        "scorers": scorers,
        "zero_spread_groups": vitals.zero_spread,
        "diversity": vitals.diversity,
        "kl": vitals.kl,
        "approx_kl": updates.sums.approx_kl / samples,
        "clip_fraction": updates.sums.clipped / samples,
        "on_policy_deviation": updates.on_policy_deviation,
        "loss": updates.sums.loss / samples,
        "grad_norm": updates.grad_norm,
        "lr": lr,
    })
}
