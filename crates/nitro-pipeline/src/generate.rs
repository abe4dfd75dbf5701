//! One request from beginning to end, told to an observer.

use std::ops::ControlFlow;

use image::RgbImage;
use nitro_diffusion::sampler::Step;

use crate::PipelineError;
use crate::pipeline::Pipeline;
use crate::request::{Generated, Output, Request, Stage, Timings};
use crate::sample::{Sample, timed};

/// What an observer of a generation hears; it answers whether to go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins.
    Stage(Stage),
    /// A denoising step has been made.
    Step(StepEvent<'a>),
}

/// A denoising step that has been made.
#[derive(Debug)]
pub struct StepEvent<'a> {
    /// Steps made so far, over all batches of the request.
    pub done: usize,
    /// Steps of the whole request.
    pub total: usize,
    /// First picture of the batch being denoised.
    pub first_picture: usize,
    /// The sampler's view: timestep, noise levels, latents, estimate of the clean latents.
    pub sampler: &'a Step<'a>,
    pipeline: &'a Pipeline,
    samples: &'a [Sample],
}

impl StepEvent<'_> {
    /// The pictures of this batch as the denoiser now expects them to become. Costs a decoding.
    pub fn preview(&self) -> Result<Vec<RgbImage>, PipelineError> {
        self.pipeline
            .previews(&self.samples.iter().collect::<Vec<_>>())
    }
}

impl Pipeline {
    /// The pictures that `request` asks for.
    pub fn generate(&self, request: &Request) -> Result<Output, PipelineError> {
        self.generate_observed(request, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Pipeline::generate`], telling `observer` how it goes. Where the observer answers
    /// `ControlFlow::Break`, the work ends with [`PipelineError::Cancelled`].
    pub fn generate_observed(
        &self,
        request: &Request,
        observer: &mut dyn FnMut(&Event<'_>) -> ControlFlow<()>,
    ) -> Result<Output, PipelineError> {
        let plan = self.plan(request)?;
        let mut progress = Progress {
            observer,
            done: 0,
            total: plan.steps * request.pictures().div_ceil(request.batch),
        };
        let mut timings = Timings::default();

        progress.tell(Event::Stage(Stage::Text))?;
        let text = timed(&mut timings.text, || self.conditions(request, &plan))?;
        progress.tell(Event::Stage(Stage::Encode))?;
        let mut samples = timed(&mut timings.encode, || self.samples(request, &plan, &text))?;
        progress.tell(Event::Stage(Stage::Denoise))?;
        timed(&mut timings.denoise, || {
            self.denoise(&mut samples, request.batch, &mut progress)
        })?;
        progress.tell(Event::Stage(Stage::Decode))?;
        let pictures = timed(&mut timings.decode, || {
            self.pictures(&samples.iter().collect::<Vec<_>>())
        })?;
        let images = pictures.into_iter().enumerate();
        let images = images.map(|(i, image)| Generated {
            image,
            prompt: i / request.images_per_prompt,
            seed: request
                .latents
                .is_none()
                .then(|| request.seed_of(i))
                .flatten(),
        });
        Ok(Output {
            images: images.collect(),
            latents: joined(&samples, |sample| sample.trajectory().latents()),
            steps: plan.steps,
            guidance_scale: plan.guidance,
            truncations: text.truncations,
            timings,
        })
    }

    /// All steps of all samples, `batch` samples at a time.
    fn denoise(
        &self,
        samples: &mut [Sample],
        batch: usize,
        progress: &mut Progress<'_>,
    ) -> Result<(), PipelineError> {
        for (i, batch_samples) in samples.chunks_mut(batch).enumerate() {
            while let Some(timestep) = batch_samples[0].trajectory().timestep() {
                self.step(&mut batch_samples.iter_mut().collect::<Vec<_>>())?;
                let trajectory = batch_samples[0].trajectory();
                let step = trajectory.completed() - 1;
                let [sigma, sigma_next] = trajectory.sigmas_of(step).unwrap_or_default();
                let sampler = Step {
                    i: step,
                    total: trajectory.total(),
                    timestep,
                    sigma,
                    sigma_next,
                    latents: &joined(batch_samples, |s| s.trajectory().latents()),
                    denoised: &joined(batch_samples, |s| s.trajectory().denoised()),
                    batch: batch_samples.len(),
                };
                progress.done += 1;
                let event = StepEvent {
                    done: progress.done,
                    total: progress.total,
                    first_picture: i * batch,
                    sampler: &sampler,
                    pipeline: self,
                    samples: batch_samples,
                };
                progress.tell(Event::Step(event))?;
            }
        }
        Ok(())
    }
}

/// The observer, and how far the request is.
struct Progress<'a> {
    observer: &'a mut dyn FnMut(&Event<'_>) -> ControlFlow<()>,
    done: usize,
    total: usize,
}

impl Progress<'_> {
    fn tell(&mut self, event: Event<'_>) -> Result<(), PipelineError> {
        match (self.observer)(&event) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(PipelineError::Cancelled {
                done: self.done,
                total: self.total,
            }),
        }
    }
}

/// Values of several samples, one after the other.
fn joined<'a>(samples: &'a [Sample], of: impl Fn(&'a Sample) -> &'a [f32]) -> Vec<f32> {
    samples.iter().flat_map(of).copied().collect()
}
