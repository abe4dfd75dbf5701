//! What a distillation is made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::CommonConfig;
use crate::grpo::EvalConfig;
use crate::prompts::PromptConfig;
use crate::rewards::RewardConfig;

/// Distillation of a model into one that needs a few steps and no guidance.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillTask {
    /// The teacher: a folder with `nitro.json`, or a repository of the Hub.
    pub model: String,
    /// Its variant.
    #[serde(default = "base")]
    pub variant: String,
    /// What the teacher paints.
    pub prompts: PromptConfig,
    /// The teacher's pictures.
    pub pairs: PairsConfig,
    /// Sampling steps of the student.
    pub steps: usize,
    /// Share of batches whose noisy latents lie on the student's own path from the pair's noise,
    /// rather than on the straight line between the pair's noise and picture (DMD2's backward
    /// simulation).
    #[serde(default)]
    pub simulate: f64,
    /// The loss against the teacher's picture.
    pub reconstruction: ReconstructionConfig,
    /// The loss against the discriminator.
    pub adversarial: AdversarialConfig,
    /// The discriminator.
    pub discriminator: DiscriminatorConfig,
    /// What held-out pictures are scored by.
    pub rewards: Vec<RewardConfig>,
    /// How progress is measured.
    pub eval: EvalConfig,
}

fn base() -> String {
    "base".into()
}

/// The teacher's pictures: pairs of noise and the latents it becomes, stored as shards.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairsConfig {
    /// Folder of the shards.
    pub folder: PathBuf,
    /// Number of shards.
    pub shards: usize,
    /// Pairs in one.
    pub shard_size: usize,
    /// The teacher's sampling steps.
    pub steps: usize,
    /// The teacher's guidance scale.
    pub guidance: f32,
    /// Pairs painted together.
    pub batch: usize,
    /// Pick among several pictures of a prompt.
    #[serde(default)]
    pub select: Option<Selection>,
}

/// The teacher's failures are not taught: a prompt is painted again, from other noise, until its
/// picture's reward is good enough (best-of-n; RAFT, arXiv 2304.06767).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// Pictures painted of a prompt at most; the best is kept.
    pub attempts: usize,
    /// The reward that is good enough.
    pub reward: f64,
}

/// The loss against the teacher's picture.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReconstructionConfig {
    /// Its weight.
    pub weight: f64,
    /// Its form.
    pub loss: ReconstructionLoss,
}

/// The form of the loss against the teacher's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReconstructionLoss {
    /// Smooth L1 on the clean latents (Nitro-1).
    SmoothL1,
    /// Squared error of the velocity: the diffusion loss on the teacher's pictures.
    Velocity,
}

/// The loss against the discriminator.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdversarialConfig {
    /// Its weight; 0 trains without a discriminator.
    pub weight: f64,
    /// Its form.
    pub loss: AdversarialLoss,
    /// First step with this loss; the discriminator begins `lead` steps before.
    #[serde(default)]
    pub start: u64,
    /// Steps that the discriminator trains alone before the student hears it.
    #[serde(default)]
    pub lead: u64,
}

/// The form of the adversarial loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdversarialLoss {
    /// Binary cross-entropy of logits (Nitro-1).
    Bce,
    /// Hinge (LADD, SANA-Sprint).
    Hinge,
}

/// The discriminator: small heads with random initialisation on features of the frozen teacher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscriminatorConfig {
    /// Blocks whose image tokens it looks at, counted from 0 over all groups.
    pub blocks: Vec<usize>,
    /// Width of a head's hidden layer.
    pub hidden: usize,
    /// Learning rate.
    pub lr: f64,
    /// Noise levels at which it looks: uniform between these two.
    pub noise: (f32, f32),
    /// Real pictures with the captions of others count as fakes.
    pub misaligned: bool,
}

impl DistillTask {
    /// Says what does not fit together.
    pub(crate) fn check(&self, run: &CommonConfig, blocks: usize) -> Result<(), TrainError> {
        let fail = |reason: String| {
            Err(TrainError::Config {
                origin: "distill".into(),
                reason,
            })
        };
        if let Some(path) = &run.init_from {
            return fail(format!(
                "run.init_from is {}: a student starts as its teacher (`task.model`, `task.variant`); leave it out",
                path.display()
            ));
        }
        let pairs = &self.pairs;
        if self.steps == 0 || pairs.shards * pairs.shard_size == 0 || pairs.batch == 0 {
            return fail("steps, pairs.shards, pairs.shard_size and pairs.batch start at 1".into());
        }
        if let Some(Selection { attempts, reward }) = pairs.select
            && (attempts == 0 || !reward.is_finite())
        {
            return fail(format!(
                "pairs.select: {attempts} attempts for a reward of {reward}: expected at least one"
            ));
        }
        if !(0.0..=1.0).contains(&self.simulate) {
            return fail(format!("simulate is {}, a share is 0 to 1", self.simulate));
        }
        let (low, high) = self.discriminator.noise;
        if !(0.0 <= low && low < high && high <= 1.0) {
            return fail(format!(
                "discriminator.noise [{low}, {high}]: expected two levels within 0 to 1"
            ));
        }
        let looks = &self.discriminator.blocks;
        if self.adversarial.weight != 0.0
            && (looks.is_empty() || looks.iter().any(|block| *block >= blocks))
        {
            return fail(format!(
                "discriminator.blocks {looks:?}: expected some of 0 to {}",
                blocks - 1
            ));
        }
        Ok(())
    }
}
