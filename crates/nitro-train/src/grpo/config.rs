//! What a GRPO run is made of.

use nitro_diffusion::sde::Stochasticity;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::adapter::AdapterConfig;
use crate::config::CommonConfig;
use crate::prompts::PromptConfig;
use crate::rewards::RewardConfig;

/// Group-relative policy optimisation. `run.max_steps` counts rollouts, `run.batch_size` is the
/// number of samples in a forward pass, in rollout and training alike.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpoTask {
    /// The model to improve: a folder with `nitro.json`, or a repository of the Hub.
    pub model: String,
    /// Its variant.
    #[serde(default = "base")]
    pub variant: String,
    /// The policy is the model with these adapters; without them it is the reference.
    pub lora: AdapterConfig,
    /// What is painted.
    pub prompts: PromptConfig,
    /// Prompts in a rollout.
    pub groups: usize,
    /// Samples of each prompt.
    pub group_size: usize,
    /// Sampling steps of a rollout.
    pub steps: usize,
    /// Guidance scale of a rollout; 1 or less is none.
    pub guidance: f32,
    /// Where rollouts draw noise from.
    pub noise: Stochasticity,
    /// Draw noise in a few steps only.
    #[serde(default)]
    pub window: Option<Window>,
    /// Share of the steps with noise that are trained on.
    pub timestep_fraction: f64,
    /// Which of them.
    #[serde(default)]
    pub timestep_choice: TimestepChoice,
    /// Samples of a group start from one noise.
    #[serde(default)]
    pub shared_noise: bool,
    /// How a policy learns from a rollout.
    #[serde(default)]
    pub objective: ObjectiveConfig,
    /// Optimiser steps made from each rollout; on the forward process, from each draw of it.
    pub updates_per_rollout: usize,
    /// Policy ratios beyond `1 +- clip_range` give no gradient.
    pub clip_range: f32,
    /// Advantages are cut at this size.
    pub advantage_clip: f32,
    /// What advantages are divided by.
    pub advantage_std: AdvantageStd,
    /// Weight of the divergence from the reference.
    pub kl_beta: f32,
    /// What is rewarded.
    pub rewards: Vec<RewardConfig>,
    /// When to stop before a ruined policy is trained on.
    #[serde(default)]
    pub collapse: CollapseConfig,
    /// How progress is measured.
    pub eval: EvalConfig,
}

fn base() -> String {
    "base".into()
}

/// How a policy learns from a rollout's advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum ObjectiveConfig {
    /// From the log-probabilities of the sampler's own stochastic steps: the clipped surrogate
    /// (Flow-GRPO).
    #[default]
    Likelihood,
    /// From the pictures alone, by flow matching towards the better and away from the worse of a group
    /// (DiffusionNFT, arXiv 2509.16117). The rollout may follow the ODE (`noise` of level 0, no window);
    /// the averaged adapter paints it and is what updates are kept close to.
    Forward {
        /// How far the implicit positive and negative policies lie from the old one.
        beta: f32,
        /// Noise levels (sigma) that are trained, drawn uniformly.
        levels: (f32, f32),
        /// Passes over the samples, each with other noise and levels.
        draws: usize,
    },
}

/// A window of steps that draw noise, drawn anew for each rollout (Flow-GRPO-Fast; MixGRPO, arXiv
/// 2507.21802).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Steps in the window.
    pub size: usize,
    /// The window starts at any of the first so many steps.
    pub starts: usize,
}

/// Which of the steps with noise are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepChoice {
    /// The first ones, the noisiest (flow_grpo): the last have the least exact probabilities.
    #[default]
    First,
    /// Any, drawn anew for each rollout (DanceGRPO).
    Random,
}

/// What advantages are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageStd {
    /// The standard deviation of all rewards of the rollout.
    Global,
    /// That of the group.
    Group,
}

/// Signs of a policy that is being lost. All are averages over the last `window` rollouts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollapseConfig {
    /// Rollouts looked at together.
    pub window: usize,
    /// The reward may fall below the best window by this share of it.
    pub reward_drop: f64,
    /// This share of groups may be without any spread in reward.
    pub zero_spread: f64,
    /// Pictures of a group must keep this share of the variety they had in the first window.
    pub diversity: f64,
    /// The divergence from the reference may reach this.
    pub kl: f64,
}

impl Default for CollapseConfig {
    fn default() -> Self {
        Self {
            window: 20,
            reward_drop: 0.3,
            zero_spread: 0.95,
            diversity: 0.3,
            kl: 1.0,
        }
    }
}

/// How progress is measured: pictures of held-out prompts by the averaged adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Rollouts between measurements; 0 never measures.
    pub every: u64,
    /// Prompts, one picture each.
    pub prompts: usize,
    /// Sampling steps, also of the exported variant.
    pub steps: usize,
    /// Guidance scale, also of the exported variant.
    pub guidance: f32,
}

impl GrpoTask {
    /// Samples of a rollout.
    pub fn samples(&self) -> usize {
        self.groups * self.group_size
    }

    /// Says what does not fit together.
    pub(crate) fn check(&self, run: &CommonConfig) -> Result<(), TrainError> {
        let fail = |reason: String| {
            Err(TrainError::Config {
                origin: "grpo".into(),
                reason,
            })
        };
        let (samples, batch) = (self.samples(), run.batch_size);
        if self.groups == 0 || self.group_size < 2 {
            return fail(format!(
                "{} groups of {}: expected at least one group of two",
                self.groups, self.group_size
            ));
        }
        if batch == 0 || !samples.is_multiple_of(batch) {
            return fail(format!(
                "{samples} samples (groups x group_size) do not divide into batches of {batch}: \
                 rollout and training must see the same batches"
            ));
        }
        let (batches, updates) = (samples / batch, self.updates_per_rollout);
        if updates == 0 || !batches.is_multiple_of(updates) {
            return fail(format!(
                "{batches} batches of a rollout do not divide into {updates} updates"
            ));
        }
        if self.steps == 0 || !(self.timestep_fraction > 0.0 && self.timestep_fraction <= 1.0) {
            return fail(format!(
                "{} steps with timestep_fraction {}: expected steps, and a fraction in (0, 1]",
                self.steps, self.timestep_fraction
            ));
        }
        if let Some(Window { size, starts }) = self.window
            && (size == 0 || starts == 0 || starts - 1 + size > self.steps)
        {
            return fail(format!(
                "a window of {size} steps from one of the first {starts} does not fit into {}",
                self.steps
            ));
        }
        if let ObjectiveConfig::Forward {
            beta,
            levels: (low, high),
            draws,
        } = self.objective
            && !(beta > 0.0 && 0.0 < low && low < high && high <= 1.0 && draws > 0)
        {
            return fail(format!(
                "objective: beta {beta}, levels [{low}, {high}], {draws} draws: expected beta above 0, two \
                 noise levels within 0 to 1, and draws"
            ));
        }
        if !(self.clip_range > 0.0 && self.advantage_clip > 0.0 && self.kl_beta >= 0.0) {
            return fail("clip_range and advantage_clip must be above 0, kl_beta not below".into());
        }
        Ok(())
    }
}
