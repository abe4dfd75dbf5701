//! One step of student and discriminator.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::schedule::Timetable;
use nitro_models::Params;
use nitro_models::emmdit::Emmdit;

use super::config::{DistillTask, ReconstructionLoss};
use super::discriminator::{Heads, PREFIX, accuracy, features};
use super::pairs::Pairs;
use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::config::CommonConfig;
use crate::data::{shuffled, step_generator};
use crate::frozen::{Denoiser, Frozen};
use crate::optimizer::{named_gradients, step};

/// Noise levels below this are not trained: there the latents are all but clean, and what the student
/// inherited serves.
const CLEAN: f32 = 0.01;

/// The pairs of one step, flat, sample-major.
pub(crate) struct Batch {
    clean: Vec<f32>,
    noise: Vec<f32>,
    prompts: Vec<String>,
    /// Index of each sample's noise level in the student's timetable.
    levels: Vec<usize>,
    /// Whether the noisy latents are the student's own.
    simulate: bool,
    /// Noise levels at which the discriminator looks, and the noise it sees fakes and reals through.
    looks: Vec<f32>,
    veils: [Vec<f32>; 2],
}

/// What a step reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) reconstruction: f64,
    pub(crate) adversarial: f64,
    pub(crate) grad_norm: f64,
    pub(crate) applied: bool,
    pub(crate) critic: Option<Critic>,
}

/// The discriminator's part.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Critic {
    pub(crate) loss: f64,
    pub(crate) grad_norm: f64,
    /// Share of tokens judged rightly, and mean logit.
    pub(crate) real: (f64, f64),
    pub(crate) fake: (f64, f64),
    pub(crate) misaligned: (f64, f64),
}

pub(crate) struct Distiller<'a> {
    pub(crate) frozen: &'a Frozen,
    /// The teacher, constants of the autodiff graph.
    pub(crate) teacher: Emmdit,
    pub(crate) pairs: &'a Pairs,
    pub(crate) timetable: Timetable,
    pub(crate) task: &'a DistillTask,
    pub(crate) run: &'a CommonConfig,
}

impl Distiller<'_> {
    /// The pairs, levels and noise of `step`: a function of the seed and the step.
    pub(crate) fn batch(&self, step: u64) -> Batch {
        let (count, each) = (self.run.batch_size, self.frozen.latent_len());
        let mut rng = step_generator(self.run.seed, step);
        let trained = self
            .timetable
            .sigmas()
            .iter()
            .filter(|s| **s > CLEAN)
            .count();
        let draws = rng.rand(count + 2);
        let level = |u: f32| ((u * trained as f32) as usize).min(trained.max(1) - 1);
        let simulate = f64::from(draws[count]) < self.task.simulate;
        // The student's own path is followed to one level for all samples.
        let levels: Vec<usize> = match simulate {
            true => vec![level(draws[count + 1]); count],
            false => draws[..count].iter().map(|u| level(*u)).collect(),
        };
        let (low, high) = self.task.discriminator.noise;
        let looks = rng
            .rand(count)
            .iter()
            .map(|u| low + u * (high - low))
            .collect();
        let mut batch = Batch {
            clean: Vec::with_capacity(count * each),
            noise: Vec::with_capacity(count * each),
            prompts: Vec::with_capacity(count),
            levels,
            simulate,
            looks,
            veils: [rng.randn(count * each), rng.randn(count * each)],
        };
        for i in 0..count {
            let place = step * count as u64 + i as u64;
            let index = shuffled(self.run.seed, place, self.pairs.len());
            let pair = self.pairs.get(index);
            batch.clean.extend(pair.clean);
            batch.noise.extend(pair.noise);
            batch.prompts.push(pair.prompt.to_owned());
        }
        batch
    }

    /// Student, then discriminator, each with its optimiser step.
    pub(crate) fn step(&self, state: &mut Checkpoint, lr: f64) -> Result<Report, TrainError> {
        let batch = self.batch(state.step);
        let prompts: Vec<&str> = batch.prompts.iter().map(String::as_str).collect();
        let text = self.frozen.text(&prompts)?;
        let noisy = self.noisy(state, &batch, &text)?;
        let adversarial = &self.task.adversarial;
        let heard = adversarial.weight != 0.0 && state.step >= adversarial.start;
        let trains =
            adversarial.weight != 0.0 && state.step + adversarial.lead >= adversarial.start;

        // The student.
        let is_student = |name: &str| !name.starts_with(PREFIX);
        let tracked = state.store.tracked_where(is_student);
        let student = self.frozen.tracked(&tracked)?;
        let times: Vec<f32> = batch
            .levels
            .iter()
            .map(|level| self.timetable.timesteps()[*level])
            .collect();
        let x = self.latents(&noisy);
        let velocity = student.forward(x.clone(), text.clone(), &times)?;
        let sigma = self.per_sample(batch.levels.iter().map(|l| self.timetable.sigmas()[*l]));
        let painted = x - velocity.clone() * sigma.clone(); // the clean latents, [B, C, H, W]
        let clean = self.latents(&batch.clean);
        let reconstruction = match self.task.reconstruction.loss {
            ReconstructionLoss::SmoothL1 => smooth_l1(painted.clone() - clean.clone()),
            ReconstructionLoss::Velocity => {
                let target = (self.latents(&noisy) - clean.clone()) / sigma;
                (velocity - target).powi_scalar(2).mean()
            }
        };
        let mut report = Report {
            reconstruction: scalar(&reconstruction),
            ..Report::default()
        };
        let mut total = reconstruction * self.task.reconstruction.weight;
        let look_times: Vec<f32> = batch.looks.iter().map(|sigma| sigma * 1000.0).collect();
        let mut fake = Vec::new();
        if trains {
            let veiled = self.veil(painted, &batch, 0);
            fake = features(
                &self.teacher,
                &self.task.discriminator.blocks,
                veiled,
                text.clone(),
                &look_times,
            )?;
        }
        if heard {
            let logits = self.heads(&tracked)?.judge(&fake);
            let loss = adversarial.loss.student(&logits);
            report.adversarial = scalar(&loss);
            total = total + loss * adversarial.weight;
        }
        let gradients = named_gradients(&tracked, &state.store, total.backward());
        let done = step(
            &mut state.store,
            &gradients,
            &self.run.optimizer,
            lr,
            state.updates + 1,
            self.run.gradient_clip,
            self.run.ema_rate,
        )?;
        report.grad_norm = done.grad_norm;
        report.applied = done.applied;
        if done.applied {
            state.updates += 1;
        }
        if trains {
            report.critic = Some(self.criticise(state, &batch, text, fake, &look_times, lr)?);
        }
        Ok(report)
    }

    /// The discriminator learns from what the student just made, the teacher's pictures, and the
    /// teacher's pictures under the captions of others.
    fn criticise(
        &self,
        state: &mut Checkpoint,
        batch: &Batch,
        text: Tensor<3>,
        fake: Vec<Tensor<3>>,
        look_times: &[f32],
        lr: f64,
    ) -> Result<Critic, TrainError> {
        let (count, config) = (self.run.batch_size, &self.task.discriminator);
        let tracked = state.store.tracked_where(|name| name.starts_with(PREFIX));
        let heads = self.heads(&tracked)?;
        let loss = self.task.adversarial.loss;
        let fake: Vec<_> = fake.into_iter().map(|x| x.inner()).collect();
        let real = self.veil(self.latents(&batch.clean), batch, 1);
        let teacher = self.frozen.pipeline.transformer();
        let look =
            |text: Tensor<3>| features(teacher, &config.blocks, real.clone(), text, look_times);
        let real_logits = heads.judge(&look(text.clone())?);
        let fake_logits = heads.judge(&fake);
        let fakes = loss.discriminator(&fake_logits, false);
        let reals = loss.discriminator(&real_logits, true);
        let mut critic = Critic {
            real: accuracy(&real_logits, true),
            fake: accuracy(&fake_logits, false),
            ..Critic::default()
        };
        let mut total = reals + fakes.clone();
        if config.misaligned && count > 1 {
            let rolled = Tensor::cat(
                vec![
                    text.clone().slice_dim(0, count - 1..count),
                    text.slice_dim(0, 0..count - 1),
                ],
                0,
            );
            let logits = heads.judge(&look(rolled)?);
            critic.misaligned = accuracy(&logits, false);
            // Both kinds of fakes together weigh as much as the reals.
            total = total + (loss.discriminator(&logits, false) - fakes) * 0.5;
        }
        critic.loss = scalar(&total);
        let gradients = named_gradients(&tracked, &state.store, total.backward());
        let begun = self
            .task
            .adversarial
            .start
            .saturating_sub(self.task.adversarial.lead);
        let done = step(
            &mut state.store,
            &gradients,
            &self.run.optimizer,
            // The discriminator follows the student's schedule.
            config.lr * lr / self.run.optimizer.lr,
            state.step + 1 - begun.min(state.step),
            self.run.gradient_clip,
            self.run.ema_rate,
        )?;
        critic.grad_norm = done.grad_norm;
        Ok(critic)
    }

    /// Noisy latents: on the line between the pair's picture and noise, or where the student's own
    /// steps lead from that noise.
    fn noisy(
        &self,
        state: &Checkpoint,
        batch: &Batch,
        text: &Tensor<3>,
    ) -> Result<Vec<f32>, TrainError> {
        let each = self.frozen.latent_len();
        let sigmas = self.timetable.sigmas();
        let upto = batch.levels.first().copied().unwrap_or(0);
        if !batch.simulate || upto == 0 {
            let pairs = batch.clean.chunks(each).zip(batch.noise.chunks(each));
            let mix = pairs
                .zip(&batch.levels)
                .flat_map(|((clean, noise), level)| {
                    let sigma = sigmas[*level];
                    let mix = move |(z, n): (&f32, &f32)| (1.0 - sigma) * z + sigma * n;
                    clean.iter().zip(noise).map(mix)
                });
            return Ok(mix.collect());
        }
        let parameters = state.store.current();
        let student = self.frozen.with(&parameters)?;
        let denoiser = Denoiser {
            model: &student,
            text: text.clone(),
            guidance: 0.0,
            shape: self.frozen.latent_shape(),
        };
        let mut x = batch.noise.clone();
        for level in 0..upto {
            let velocity = denoiser.velocity(&x, self.timetable.timesteps()[level])?;
            let step = sigmas[level + 1] - sigmas[level];
            for (x, velocity) in x.iter_mut().zip(velocity) {
                *x += step * velocity;
            }
        }
        Ok(x)
    }

    /// Latents at the noise levels at which the discriminator looks.
    fn veil(&self, clean: Tensor<4>, batch: &Batch, which: usize) -> Tensor<4> {
        let sigma = self.per_sample(batch.looks.iter().copied());
        let noise = self.latents(&batch.veils[which]) * sigma.clone();
        clean * (sigma.neg() + 1.0) + noise
    }

    fn heads(&self, parameters: &nitro_models::TensorMap) -> Result<Heads, TrainError> {
        let device = Device::flex().autodiff();
        // Small and decisive: in full precision.
        let p = Params::new(parameters, &device, nitro_ops::Precision::F32);
        let width = self.frozen.config.width();
        Ok(Heads::new(&self.task.discriminator, width, &p)?)
    }

    fn latents(&self, values: &[f32]) -> Tensor<4> {
        let [c, h, w] = self.frozen.latent_shape();
        let shape = [values.len() / (c * h * w), c, h, w];
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn per_sample(&self, values: impl Iterator<Item = f32>) -> Tensor<4> {
        let values: Vec<f32> = values.collect();
        let shape = [values.len(), 1, 1, 1];
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }
}

/// `0.5 d^2` up to 1, then `|d| - 0.5`; the mean.
fn smooth_l1(difference: Tensor<4>) -> Tensor<1> {
    let size = difference.abs();
    let near = size.clone().clamp_max(1.0);
    (near.clone().powi_scalar(2) * 0.5 + (size - near)).mean()
}

fn scalar(x: &Tensor<1>) -> f64 {
    f64::from(x.clone().into_scalar::<f32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smooth_l1_is_torchs() {
        let values = vec![0.5, -2.0, 0.0, 1.0];
        let data = TensorData::new(values, [1, 1, 2, 2]);
        let loss = smooth_l1(Tensor::from_data(data, &Device::flex()));
        assert!((scalar(&loss) - (0.125 + 1.5 + 0.0 + 0.5) / 4.0).abs() < 1e-6);
    }
}
