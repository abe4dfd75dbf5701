//! Learning from a rollout's pictures on the forward process (DiffusionNFT, arXiv 2509.16117).
//!
//! A picture's clean latents are noised again to levels of one's choice, and the conditional velocity
//! there learns by flow matching: with an optimality `r` of 0 to 1 from the picture's advantage,
//! `r |v+ - v|^2 + (1 - r) |v- - v|^2`, where `v` is the picture's own velocity and
//! `v+-` are `(1 -+ beta) old +- beta policy`. What is good is approached, what is bad is left, and
//! without any advantage the policy is drawn to the old one. No likelihood of the sampler is needed, so
//! rollouts may follow the ODE, and each picture teaches at every noise level. Under guidance the
//! unconditional velocity stays as it is.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::guidance;
use nitro_models::Params;
use nitro_models::emmdit::Emmdit;
use nitro_ops::Precision;

use super::objective::StepSums;
use super::rollout::{Batch, Rollout};
use super::update::{Learner, Updates};
use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::data::noise_generator;
use crate::frozen::values;
use crate::optimizer::{NamedGradients, accumulate, named_gradients, step};

/// Keeps the noise of this objective apart from other noise of the seed.
const NOISE: u64 = 0x666F_7277;

/// The objective with what it compares to.
pub(super) struct Forward<'a> {
    pub(super) learner: &'a Learner<'a>,
    /// The policy that painted the rollout.
    pub(super) old: &'a Emmdit,
    pub(super) beta: f32,
    pub(super) levels: (f32, f32),
    pub(super) draws: usize,
}

/// Noisy latents of a batch, flat, sample-major.
struct Noisy {
    latents: Vec<f32>,
    /// The pictures' own velocities: noise less clean latents.
    velocity: Vec<f32>,
    /// Per sample.
    sigmas: Vec<f32>,
}

impl Forward<'_> {
    /// Makes the updates of a rollout.
    pub(super) fn learn(
        &self,
        state: &mut Checkpoint,
        rollout: &Rollout,
        advantages: &[f32],
        lr: f64,
    ) -> Result<Updates, TrainError> {
        let (task, run) = (self.learner.task, self.learner.run);
        let each = rollout.batches.len() / task.updates_per_rollout;
        let count = self.draws * task.updates_per_rollout;
        let mut report = Updates::default();
        for draw in 0..self.draws {
            for batches in rollout.batches.chunks(each) {
                let (sums, gradients) = self.gradients(state, batches, advantages, draw)?;
                report.sums.add(sums);
                let done = step(
                    &mut state.store,
                    &gradients,
                    &run.optimizer,
                    lr,
                    state.updates + 1,
                    run.gradient_clip,
                    run.ema_rate,
                )?;
                report.grad_norm += done.grad_norm / count as f64;
                if done.applied {
                    state.updates += 1;
                    report.applied += 1;
                }
            }
        }
        Ok(report)
    }

    /// The gradient of the mean loss over some batches.
    fn gradients(
        &self,
        state: &Checkpoint,
        batches: &[Batch],
        advantages: &[f32],
        draw: usize,
    ) -> Result<(StepSums, NamedGradients), TrainError> {
        let frozen = self.learner.frozen;
        let tracked = state.store.tracked();
        let device = Device::flex().autodiff();
        let samples: usize = batches.iter().map(|b| b.samples.len()).sum();
        let (mut sums, mut total) = (StepSums::default(), NamedGradients::new());
        for (b, batch) in batches.iter().enumerate() {
            let noisy = self.noisy(state.step, batch, draw);
            // Each backward pass consumes the graph from the parameters on, model and all.
            let params = Params::new(&tracked, &device, Precision::F32);
            let live = self.learner.adapter.build(&params)?;
            let policy = frozen.adapted_tracked(&live)?;
            let raw = self.velocity(&policy, batch, &noisy)?;
            let (part, mut grad) = nft(
                &values(raw.clone()),
                &values(self.velocity(self.old, batch, &noisy)?),
                &noisy.velocity,
                &advantages[batch.samples.clone()],
                self.beta,
            );
            sums.add(part);
            if draw == 0 && b == 0 {
                let reference =
                    values(self.velocity(frozen.pipeline.transformer(), batch, &noisy)?);
                let pairs = values(raw.clone()).into_iter().zip(reference);
                let apart: f64 = pairs.map(|(a, b)| f64::from((a - b) * (a - b))).sum();
                sums.kl += apart / frozen.latent_len() as f64;
                sums.kl_samples += batch.samples.len() as f64;
            }
            grad.iter_mut().for_each(|g| *g /= samples as f32);
            let grad = Tensor::<4>::from_data(TensorData::new(grad, raw.dims()), &Device::flex());
            // Its derivative by the model's parameters is that of the loss.
            let surrogate = (raw * grad).sum();
            let named = named_gradients(&tracked, &state.store, surrogate.backward());
            accumulate(&mut total, named);
        }
        Ok((sums, total))
    }

    /// The batch's pictures at this draw's noise levels: a function of the seed, the step and the draw.
    fn noisy(&self, step: u64, batch: &Batch, draw: usize) -> Noisy {
        let each = self.learner.frozen.latent_len();
        let (low, high) = self.levels;
        let mut noisy = Noisy {
            latents: Vec::new(),
            velocity: Vec::new(),
            sigmas: Vec::new(),
        };
        let clean = batch.trajectory.clean().chunks(each);
        for (i, clean) in batch.samples.clone().zip(clean) {
            let index = draw * self.learner.task.samples() + i;
            let mut rng = noise_generator(self.learner.run.seed ^ NOISE, step, index);
            // The draws of a sample share the range between them.
            let stratum = ((draw + i) % self.draws) as f32;
            let sigma = low + (high - low) * (stratum + rng.rand(1)[0]) / self.draws as f32;
            let noise = rng.randn(each);
            noisy.sigmas.push(sigma);
            for (x, n) in clean.iter().zip(noise) {
                noisy.latents.push((1.0 - sigma) * x + sigma * n);
                noisy.velocity.push(n - x);
            }
        }
        noisy
    }

    /// The conditional velocity, `[B, C, H, W]`.
    fn velocity(
        &self,
        model: &Emmdit,
        batch: &Batch,
        noisy: &Noisy,
    ) -> Result<Tensor<4>, TrainError> {
        let [c, h, w] = self.learner.frozen.latent_shape();
        let count = noisy.sigmas.len();
        // Under guidance the states of the negative prompts come first.
        let text = match guidance::is_active(self.learner.task.guidance) {
            true => batch.text.clone().slice_dim(0, count..2 * count),
            false => batch.text.clone(),
        };
        let latents = TensorData::new(noisy.latents.clone(), [count, c, h, w]);
        let latents = Tensor::from_data(latents, &Device::flex());
        let timesteps: Vec<f32> = noisy.sigmas.iter().map(|sigma| sigma * 1000.0).collect();
        // A model that also predicts variances has them in further channels.
        Ok(model.forward(latents, text, &timesteps)?.slice_dim(1, 0..c))
    }
}

/// The sums over the batch, and the gradient of the summed loss with respect to the policy's velocity.
/// A sample's loss is the mean over its elements.
fn nft(
    policy: &[f32],
    old: &[f32],
    velocity: &[f32],
    advantages: &[f32],
    beta: f32,
) -> (StepSums, Vec<f32>) {
    let each = policy.len() / advantages.len().max(1);
    let mut sums = StepSums::default();
    let mut grad = Vec::with_capacity(policy.len());
    for (i, advantage) in advantages.iter().enumerate() {
        let optimality = 0.5 + 0.5 * advantage.clamp(-1.0, 1.0);
        let part = i * each..(i + 1) * each;
        let triples = policy[part.clone()].iter().zip(&old[part.clone()]);
        let mut loss = 0.0;
        for ((policy, old), velocity) in triples.zip(&velocity[part]) {
            let positive = (1.0 - beta) * old + beta * policy - velocity;
            let negative = (1.0 + beta) * old - beta * policy - velocity;
            loss += f64::from(
                optimality * positive * positive + (1.0 - optimality) * negative * negative,
            );
            let slope = optimality * positive - (1.0 - optimality) * negative;
            grad.push(2.0 * beta * slope / each as f32);
        }
        sums.samples += 1.0;
        sums.loss += loss / each as f64;
    }
    (sums, grad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nitro_diffusion::noise::CpuGenerator;

    const EACH: usize = 16;

    fn case() -> [Vec<f32>; 3] {
        let mut rng = CpuGenerator::new(3);
        [(); 3].map(|()| rng.randn(3 * EACH))
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let [policy, old, velocity] = case();
        let at = |policy: &[f32]| nft(policy, &old, &velocity, &[0.7, -0.4, 3.0], 0.5);
        let (_, grad) = at(&policy);
        for i in [0, EACH + 3, 3 * EACH - 1] {
            let moved = |by: f32| {
                let mut policy = policy.clone();
                policy[i] += by;
                at(&policy).0.loss
            };
            let numeric = (moved(0.05) - moved(-0.05)) / 0.1;
            assert!(
                (numeric - f64::from(grad[i])).abs() < 1e-3,
                "{i}: {numeric} {}",
                grad[i]
            );
        }
    }

    #[test]
    fn the_policy_goes_to_good_pictures_away_from_bad_ones_and_else_to_the_old_policy() {
        let [policy, old, velocity] = case();
        let (_, grad) = nft(&old, &old, &velocity, &[1.0, -1.0, 0.0], 1.0);
        for i in 0..EACH {
            assert!(
                grad[i] * (old[i] - velocity[i]) >= 0.0,
                "downhill is towards it"
            );
            let i = EACH + i;
            assert!(
                grad[i] * (old[i] - velocity[i]) <= 0.0,
                "downhill is away from it"
            );
        }
        assert!(grad[2 * EACH..].iter().all(|g| g.abs() < 1e-6));
        let (_, grad) = nft(&policy, &old, &velocity, &[0.0; 3], 1.0);
        for ((grad, policy), old) in grad.iter().zip(&policy).zip(&old) {
            assert!(grad * (policy - old) >= 0.0);
        }
    }
}
