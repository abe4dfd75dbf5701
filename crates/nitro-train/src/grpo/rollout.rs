//! Rollouts: groups of samples with the log-probability of every step, scored while the next are
//! being painted.

use std::sync::mpsc;
use std::time::Instant;

use burn::tensor::Tensor;
use image::RgbImage;
use nitro_diffusion::noise::CpuGenerator;
use nitro_diffusion::schedule::{FlowMatchEuler, Timetable};
use nitro_diffusion::sde::{Sampler, Trajectory};
use nitro_eval::geneval::Metadata;
use nitro_models::emmdit::Emmdit;

use super::config::{GrpoTask, TimestepChoice, Window};
use crate::TrainError;
use crate::data::example_seed;
use crate::frozen::{Denoiser, Frozen, unwrap_sampling};
use crate::prompts::Prompts;
use crate::rewards::{Rewards, Sample, Scores};

/// The samples of one rollout. Sample `i` is of group `i % groups`, so that every batch of
/// consecutive samples has some of each group.
pub(crate) struct Rollout {
    /// The prompt of each group.
    pub(crate) prompts: Vec<Metadata>,
    pub(crate) batches: Vec<Batch>,
    pub(crate) pictures: Vec<RgbImage>,
    pub(crate) scores: Scores,
    pub(crate) plan: StepPlan,
    /// Seconds of painting, and of waiting for rewards after it.
    pub(crate) seconds: (f64, f64),
}

/// The samples of one forward pass.
pub(crate) struct Batch {
    pub(crate) samples: std::ops::Range<usize>,
    /// Text states as the denoiser takes them.
    pub(crate) text: Tensor<3>,
    pub(crate) trajectory: Trajectory,
}

/// Which steps draw noise and which are trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StepPlan {
    pub(crate) timetable: Timetable,
    pub(crate) noisy: std::ops::Range<usize>,
    pub(crate) trained: Vec<usize>,
}

impl StepPlan {
    /// The plan of rollout `step`.
    pub(crate) fn new(task: &GrpoTask, seed: u64, step: u64) -> Result<Self, TrainError> {
        let timetable = FlowMatchEuler::nitro_e().timetable(task.steps)?;
        let noisy = match task.window {
            None => 0..task.steps,
            Some(Window { size, starts }) => {
                let start = (example_seed(seed ^ 0x77, step, 0) % starts as u64) as usize;
                start..start + size
            }
        };
        let mut candidates: Vec<usize> = noisy.clone().collect();
        if task.timestep_choice == TimestepChoice::Random {
            candidates.sort_by_key(|i| example_seed(seed ^ 0x73, step, *i));
        }
        let count = (candidates.len() as f64 * task.timestep_fraction) as usize;
        candidates.truncate(count.max(1));
        candidates.sort_unstable();
        Ok(Self {
            timetable,
            noisy,
            trained: candidates,
        })
    }

    /// The sampler of this plan.
    pub(crate) fn sampler(&self, task: &GrpoTask) -> Sampler<'_> {
        Sampler::new(&self.timetable, task.noise).window(self.noisy.clone())
    }
}

/// What rollouts are made with.
pub(crate) struct Studio<'a> {
    pub(crate) frozen: &'a Frozen,
    pub(crate) task: &'a GrpoTask,
    pub(crate) prompts: &'a Prompts,
    pub(crate) rewards: &'a Rewards,
    pub(crate) seed: u64,
    pub(crate) batch_size: usize,
}

impl Studio<'_> {
    /// Rollout `step` of the policy `model`: a function of the seed, the step and the model.
    pub(crate) fn rollout(&self, model: &Emmdit, step: u64) -> Result<Rollout, TrainError> {
        let task = self.task;
        let begun = Instant::now();
        let plan = StepPlan::new(task, self.seed, step)?;
        let first = step * task.groups as u64;
        let prompts: Vec<Metadata> = (0..task.groups as u64)
            .map(|group| self.prompts.get(self.seed, first + group))
            .collect();
        let of = |sample: usize| &prompts[sample % task.groups];

        let (send, receive) = mpsc::channel::<(std::ops::Range<usize>, Vec<RgbImage>)>();
        let (batches, scored, painted) = std::thread::scope(|scope| {
            let critic = scope.spawn(|| self.criticise(receive, of));
            let batches: Result<Vec<Batch>, TrainError> = (0..task.samples())
                .step_by(self.batch_size)
                .map(|first| {
                    let samples = first..first + self.batch_size;
                    let texts: Vec<&str> = samples.clone().map(|i| of(i).prompt.as_str()).collect();
                    let batch = self.paint(model, step, samples, &texts, &plan)?;
                    let pictures = self.frozen.decode(batch.trajectory.clean())?;
                    // If nobody listens any more, the critic's own error will tell why.
                    let _ = send.send((batch.samples.clone(), pictures));
                    Ok(batch)
                })
                .collect();
            drop(send);
            let painted = begun.elapsed().as_secs_f64();
            let scored = critic.join().unwrap_or_else(|_| {
                Err(TrainError::Reward {
                    scorer: "the thread of all scorers".into(),
                    reason: "it panicked".into(),
                })
            });
            (batches, scored, painted)
        });
        let batches = batches?;
        let (scores, pictures) = scored?;
        Ok(Rollout {
            prompts,
            batches,
            pictures,
            scores,
            plan,
            seconds: (painted, begun.elapsed().as_secs_f64() - painted),
        })
    }

    /// Scores pictures as they come.
    fn criticise<'m>(
        &self,
        receive: mpsc::Receiver<(std::ops::Range<usize>, Vec<RgbImage>)>,
        of: impl Fn(usize) -> &'m Metadata,
    ) -> Result<(Scores, Vec<RgbImage>), TrainError> {
        let (mut scores, mut all) = (Scores::default(), Vec::new());
        for (indices, pictures) in receive {
            let samples: Vec<Sample<'_>> = indices
                .clone()
                .zip(&pictures)
                .map(|(i, picture)| Sample {
                    metadata: of(i),
                    picture,
                })
                .collect();
            let some = self.rewards.score(&samples)?;
            let indices: Vec<usize> = indices.collect();
            scores.place(self.task.samples(), &indices, some);
            all.extend(pictures);
        }
        Ok((scores, all))
    }

    fn paint(
        &self,
        model: &Emmdit,
        step: u64,
        samples: std::ops::Range<usize>,
        texts: &[&str],
        plan: &StepPlan,
    ) -> Result<Batch, TrainError> {
        let (task, each) = (self.task, self.frozen.latent_len());
        let mut generators: Vec<CpuGenerator> = samples
            .clone()
            .map(|i| CpuGenerator::new(example_seed(self.seed ^ 0x6E, step, i)))
            .collect();
        let mut noise = Vec::with_capacity(samples.len() * each);
        for (i, generator) in samples.clone().zip(&mut generators) {
            let own = generator.randn(each);
            noise.extend(match task.shared_noise {
                false => own,
                true => {
                    let group = i % task.groups;
                    CpuGenerator::new(example_seed(self.seed ^ 0x67, step, group)).randn(each)
                }
            });
        }
        let text = self.frozen.guided_text(texts, task.guidance)?;
        let denoiser = Denoiser {
            model,
            text: text.clone(),
            guidance: task.guidance,
            shape: self.frozen.latent_shape(),
        };
        let trajectory = plan
            .sampler(task)
            .run(noise, &mut generators, |x: &[f32], timestep| {
                denoiser.velocity(x, timestep)
            })
            .map_err(unwrap_sampling)?;
        Ok(Batch {
            samples,
            text,
            trajectory,
        })
    }
}

impl Rollout {
    /// How much the pictures of one prompt differ: the standard deviation of a pixel within a group,
    /// in levels of 255, averaged.
    pub(crate) fn diversity(&self) -> f64 {
        let groups = self.prompts.len();
        let mut total = 0.0;
        for group in 0..groups {
            let own: Vec<&[u8]> = self
                .pictures
                .iter()
                .skip(group)
                .step_by(groups)
                .map(|p| p.as_raw().as_slice())
                .collect();
            let n = own.len().max(1) as f64;
            let values = own.first().map_or(0, |p| p.len());
            let spread = |i: usize| {
                let sum = own.iter().map(|p| f64::from(p[i])).sum::<f64>();
                let squares = own.iter().map(|p| f64::from(p[i]).powi(2)).sum::<f64>();
                (squares / n - (sum / n).powi(2)).max(0.0).sqrt()
            };
            // Every seventh value is plenty.
            let some = (0..values).step_by(7);
            let count = some.len().max(1) as f64;
            total += some.map(spread).sum::<f64>() / count;
        }
        total / groups.max(1) as f64
    }
}
