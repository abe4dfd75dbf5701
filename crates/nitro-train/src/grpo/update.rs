//! From a rollout to optimiser steps.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::Params;
use nitro_models::emmdit::Emmdit;
use nitro_ops::Precision;

use super::config::GrpoTask;
use super::objective::{Objective, StepInputs, StepSums};
use super::rollout::{Batch, Rollout};
use crate::TrainError;
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::config::CommonConfig;
use crate::frozen::{Denoiser, Frozen, values};
use crate::optimizer::{NamedGradients, accumulate, named_gradients, step};

/// What the updates of a rollout did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Updates {
    pub(crate) sums: StepSums,
    /// Largest distance of a ratio from 1 in the first update, where the policy is still that of the
    /// rollout: 0 if rollout and training agree to the bit.
    pub(crate) on_policy_deviation: f64,
    /// Norm of the gradient, averaged over updates.
    pub(crate) grad_norm: f64,
    /// Updates whose gradient was finite.
    pub(crate) applied: u64,
}

/// What updates are made with.
pub(crate) struct Learner<'a> {
    pub(crate) frozen: &'a Frozen,
    pub(crate) adapter: &'a Adapter,
    pub(crate) task: &'a GrpoTask,
    pub(crate) run: &'a CommonConfig,
}

impl Learner<'_> {
    /// Makes the updates of a rollout.
    pub(crate) fn learn(
        &self,
        state: &mut Checkpoint,
        rollout: &Rollout,
        advantages: &[f32],
        lr: f64,
    ) -> Result<Updates, TrainError> {
        let count = self.task.updates_per_rollout;
        let each = rollout.batches.len() / count;
        let mut report = Updates::default();
        for (i, batches) in rollout.batches.chunks(each).enumerate() {
            let (sums, gradients) = self.gradients(state, rollout, batches, advantages, i == 0)?;
            if i == 0 {
                report.on_policy_deviation = sums.deviation;
            }
            report.sums.add(sums);
            let done = step(
                &mut state.store,
                &gradients,
                &self.run.optimizer,
                lr,
                state.updates + 1,
                self.run.gradient_clip,
                self.run.ema_rate,
            )?;
            report.grad_norm += done.grad_norm / count as f64;
            if done.applied {
                state.updates += 1;
                report.applied += 1;
            }
        }
        Ok(report)
    }

    /// The gradient of the mean loss over some batches and all trained steps.
    fn gradients(
        &self,
        state: &Checkpoint,
        rollout: &Rollout,
        batches: &[Batch],
        advantages: &[f32],
        first: bool,
    ) -> Result<(StepSums, NamedGradients), TrainError> {
        let tracked = state.store.tracked();
        let device = Device::flex().autodiff();
        let objective = Objective {
            clip_range: self.task.clip_range,
            kl_beta: self.task.kl_beta,
        };
        let trained = &rollout.plan.trained;
        let samples: usize = batches.iter().map(|b| b.samples.len()).sum();
        let share = 1.0 / (samples * trained.len()) as f32;
        let sampler = rollout.plan.sampler(self.task);
        let (mut sums, mut total) = (StepSums::default(), NamedGradients::new());
        for (b, batch) in batches.iter().enumerate() {
            for (s, &at) in trained.iter().enumerate() {
                let (latents, next) = (
                    &batch.trajectory.states[at],
                    &batch.trajectory.states[at + 1],
                );
                let timestep = rollout.plan.timetable.timesteps()[at];
                // Each backward pass consumes the graph from the parameters on, model and all.
                let params = Params::new(&tracked, &device, Precision::F32);
                let live = self.adapter.build(&params)?;
                let policy = self.frozen.adapted_tracked(&live)?;
                let denoiser = self.denoiser(&policy, batch);
                let raw = denoiser.raw(latents, timestep)?;
                let velocity = denoiser.guide(values(raw.clone()));
                // The divergence is always logged; where it has no weight, from one step.
                let watched = self.task.kl_beta > 0.0 || (first && b == 0 && s == 0);
                let reference = match watched {
                    true => Some(
                        self.denoiser(self.frozen.pipeline.transformer(), batch)
                            .velocity(latents, timestep)?,
                    ),
                    false => None,
                };
                let (part, mut grad) = objective.step(&StepInputs {
                    transition: sampler.transition(at)?,
                    latents,
                    next,
                    velocity: &velocity,
                    reference: reference.as_deref(),
                    log_probs: &batch.trajectory.log_probs[at],
                    advantages: &advantages[batch.samples.clone()],
                })?;
                sums.add(part);
                if grad.iter().all(|g| *g == 0.0) {
                    continue;
                }
                grad.iter_mut().for_each(|g| *g *= share);
                let grad = denoiser.guide_backward(grad);
                let grad = TensorData::new(grad, raw.dims());
                let grad = Tensor::<4>::from_data(grad, &Device::flex());
                // Its derivative by the model's parameters is that of the loss.
                let surrogate = (raw * grad).sum();
                let named = named_gradients(&tracked, &state.store, surrogate.backward());
                accumulate(&mut total, named);
            }
        }
        Ok((sums, total))
    }

    fn denoiser<'m>(&self, model: &'m Emmdit, batch: &Batch) -> Denoiser<'m> {
        Denoiser {
            model,
            text: batch.text.clone(),
            guidance: self.task.guidance,
            shape: self.frozen.latent_shape(),
        }
    }
}
