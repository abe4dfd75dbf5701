//! The Euler sampler of the flow-matching ODE, over a denoiser given as a function.

use std::ops::ControlFlow;

use crate::{
    Error, Result,
    schedule::{Timetable, add_noise},
};

/// What a sampling callback sees after each step.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Index of the step just made, from 0.
    pub i: usize,
    /// Number of steps of this run.
    pub total: usize,
    /// The timestep the denoiser was given.
    pub timestep: f32,
    /// The noise level before the step.
    pub sigma: f32,
    /// The noise level after it.
    pub sigma_next: f32,
    /// Latents after the step, `batch * n` values, sample-major.
    pub latents: &'a [f32],
    /// The denoiser's estimate of the clean latents (x0), for previews.
    pub denoised: &'a [f32],
    /// Number of samples.
    pub batch: usize,
}

/// Why a sampling run gave no sample. `E` is the denoiser's own error.
#[derive(Debug, thiserror::Error)]
pub enum SampleError<E: std::error::Error + 'static> {
    /// The callback asked to stop.
    #[error("sampling was cancelled after {completed} of {total} steps")]
    Cancelled {
        /// Steps made before the stop.
        completed: usize,
        /// Steps of the whole run.
        total: usize,
    },
    /// The denoiser failed.
    #[error("the denoiser failed at step {step} of {total}")]
    Denoiser {
        /// Index of the step, from 0.
        step: usize,
        /// Steps of the whole run.
        total: usize,
        /// The denoiser's error.
        source: E,
    },
    /// The request itself was wrong, or the denoiser returned a velocity of the wrong size.
    #[error(transparent)]
    Invalid(#[from] Error),
}

/// Keeps part of an image while the rest is painted anew.
///
/// After every step the kept region is put back at the noise level just reached (diffusers'
/// behaviour for models without mask channels, as in its SD3 inpainting pipeline).
#[derive(Debug, Clone, Copy)]
pub struct Inpaint<'a> {
    /// Clean latents of the original image, `batch * n` values.
    pub image: &'a [f32],
    /// The noise the run started from, `batch * n` values.
    pub noise: &'a [f32],
    /// 1 where to paint, 0 where to keep, `batch * n` values (see [`expand_mask`]).
    pub mask: &'a [f32],
}

/// Euler integration of `dx / dsigma = velocity` from the first sigma of a timetable to 0.
#[derive(Debug, Clone, Copy)]
pub struct Euler<'a> {
    timetable: &'a Timetable,
    inpaint: Option<Inpaint<'a>>,
}

impl<'a> Euler<'a> {
    /// A sampler through these noise levels.
    pub fn new(timetable: &'a Timetable) -> Self {
        Self {
            timetable,
            inpaint: None,
        }
    }

    /// Repaints only the masked part of an image.
    pub fn inpaint(mut self, inpaint: Inpaint<'a>) -> Self {
        self.inpaint = Some(inpaint);
        self
    }

    /// Runs all steps and returns the clean latents.
    ///
    /// - `latents`: the starting point, `batch * n` values, sample-major: noise, or
    ///   [`image_to_image_start`].
    /// - `denoise`: maps latents and the timestep to the velocity, in the same layout.
    /// - `on_step`: called after each step; `ControlFlow::Break` stops with
    ///   [`SampleError::Cancelled`].
    pub fn run<E: std::error::Error + 'static>(
        &self,
        mut latents: Vec<f32>,
        batch: usize,
        mut denoise: impl FnMut(&[f32], f32) -> Result<Vec<f32>, E>,
        mut on_step: impl FnMut(&Step<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<f32>, SampleError<E>> {
        self.check(latents.len(), batch)?;
        let total = self.timetable.len();
        let mut denoised = vec![0.0; latents.len()];
        for (i, (&timestep, sigmas)) in self
            .timetable
            .timesteps()
            .iter()
            .zip(self.timetable.sigmas().windows(2))
            .enumerate()
        {
            let (sigma, sigma_next) = (sigmas[0], sigmas[1]);
            let velocity = denoise(&latents, timestep).map_err(|source| SampleError::Denoiser {
                step: i,
                total,
                source,
            })?;
            advance(
                &mut latents,
                &mut denoised,
                &velocity,
                [sigma, sigma_next],
                self.inpaint.as_ref(),
            )?;
            let step = Step {
                i,
                total,
                timestep,
                sigma,
                sigma_next,
                latents: &latents,
                denoised: &denoised,
                batch,
            };
            if on_step(&step).is_break() {
                return Err(SampleError::Cancelled {
                    completed: i + 1,
                    total,
                });
            }
        }
        Ok(latents)
    }

    fn check(&self, len: usize, batch: usize) -> Result<()> {
        if self.timetable.is_empty() {
            return Err(Error::NoSteps { steps: 0 });
        }
        if batch == 0 || !len.is_multiple_of(batch) {
            return Err(Error::Batch { len, batch });
        }
        if let Some(inpaint) = &self.inpaint {
            expect_len("inpainting image", inpaint.image.len(), len)?;
            expect_len("inpainting noise", inpaint.noise.len(), len)?;
            expect_len("inpainting mask", inpaint.mask.len(), len)?;
        }
        Ok(())
    }
}

/// One Euler step from `sigma` to `sigma_next`, in place; `denoised` gets the estimate of the clean
/// latents.
fn advance(
    latents: &mut [f32],
    denoised: &mut [f32],
    velocity: &[f32],
    [sigma, sigma_next]: [f32; 2],
    inpaint: Option<&Inpaint<'_>>,
) -> Result<()> {
    expect_len("the denoiser's velocity", velocity.len(), latents.len())?;
    for ((x, x0), velocity) in latents.iter_mut().zip(denoised).zip(velocity) {
        *x0 = *x - sigma * velocity;
        *x += (sigma_next - sigma) * velocity;
    }
    if let Some(inpaint) = inpaint {
        // sigma_next is 0 after the last step: the original itself.
        let kept = add_noise(inpaint.image, inpaint.noise, sigma_next)?;
        for ((x, kept), mask) in latents.iter_mut().zip(kept).zip(inpaint.mask) {
            *x = (1.0 - mask) * kept + mask * *x;
        }
    }
    Ok(())
}

/// What [`Inpaint`] keeps, owned: the clean latents, the starting noise and the mask of one sample.
#[derive(Debug, Clone)]
pub struct Kept {
    /// As [`Inpaint::image`].
    pub image: Vec<f32>,
    /// As [`Inpaint::noise`].
    pub noise: Vec<f32>,
    /// As [`Inpaint::mask`].
    pub mask: Vec<f32>,
}

/// One sample on its way, advanced step by step by whoever computes velocities.
///
/// [`Euler::run`] takes a batch from start to end; trajectories let samples with schedules of their
/// own join and leave a batch between steps. Both make the same steps.
#[derive(Debug, Clone)]
pub struct Trajectory {
    timetable: Timetable,
    latents: Vec<f32>,
    denoised: Vec<f32>,
    completed: usize,
    kept: Option<Kept>,
}

impl Trajectory {
    /// A sample at the start of `timetable`.
    pub fn new(timetable: Timetable, latents: Vec<f32>, kept: Option<Kept>) -> Result<Self> {
        if timetable.is_empty() {
            return Err(Error::NoSteps { steps: 0 });
        }
        if let Some(kept) = &kept {
            expect_len("inpainting image", kept.image.len(), latents.len())?;
            expect_len("inpainting noise", kept.noise.len(), latents.len())?;
            expect_len("inpainting mask", kept.mask.len(), latents.len())?;
        }
        Ok(Self {
            denoised: latents.clone(),
            timetable,
            latents,
            completed: 0,
            kept,
        })
    }

    /// The timestep at which the next velocity is wanted; `None` when the sample is finished.
    pub fn timestep(&self) -> Option<f32> {
        self.timetable.timesteps().get(self.completed).copied()
    }

    /// Makes the next step with the velocity at [`Self::latents`] and [`Self::timestep`]. A finished
    /// sample stays as it is.
    pub fn advance(&mut self, velocity: &[f32]) -> Result<()> {
        let Some(sigmas) = self.sigmas_of(self.completed) else {
            return Ok(());
        };
        let inpaint = self.kept.as_ref().map(|kept| Inpaint {
            image: &kept.image,
            noise: &kept.noise,
            mask: &kept.mask,
        });
        advance(
            &mut self.latents,
            &mut self.denoised,
            velocity,
            sigmas,
            inpaint.as_ref(),
        )?;
        self.completed += 1;
        Ok(())
    }

    /// The noise levels before and after step `i`.
    pub fn sigmas_of(&self, i: usize) -> Option<[f32; 2]> {
        let sigmas = self.timetable.sigmas();
        Some([*sigmas.get(i)?, *sigmas.get(i + 1)?])
    }

    /// The noise levels it visits.
    pub fn timetable(&self) -> &Timetable {
        &self.timetable
    }

    /// Steps made.
    pub fn completed(&self) -> usize {
        self.completed
    }

    /// Steps of the whole run.
    pub fn total(&self) -> usize {
        self.timetable.len()
    }

    /// The latents as they are now.
    pub fn latents(&self) -> &[f32] {
        &self.latents
    }

    /// The last step's estimate of the clean latents; the start before any step.
    pub fn denoised(&self) -> &[f32] {
        &self.denoised
    }
}

/// Starting latents for image-to-image: the image noised to the first level of `timetable`.
///
/// Use with [`Timetable::for_strength`]. At sigma 1 this is the noise alone.
pub fn image_to_image_start(
    image: &[f32],
    noise: &[f32],
    timetable: &Timetable,
) -> Result<Vec<f32>> {
    let sigma = *timetable
        .sigmas()
        .first()
        .ok_or(Error::NoSteps { steps: 0 })?;
    add_noise(image, noise, sigma)
}

/// Repeats a mask of one latent plane (`height * width`) over `channels` and `batch`.
pub fn expand_mask(plane: &[f32], channels: usize, batch: usize) -> Vec<f32> {
    plane.repeat(channels * batch)
}

fn expect_len(what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            got,
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{noise::CpuGenerator, schedule::FlowMatchEuler};
    use std::convert::Infallible;

    fn go_on(_: &Step<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The exact velocity towards `target`: constant along the straight path from any noise.
    fn towards<'a>(
        target: &'a [f32],
        start: &'a [f32],
    ) -> impl FnMut(&[f32], f32) -> Result<Vec<f32>, Infallible> + 'a {
        move |_, _| Ok(start.iter().zip(target).map(|(n, x)| n - x).collect())
    }

    #[test]
    fn a_straight_flow_arrives_in_any_number_of_steps() {
        let noise = CpuGenerator::new(1).randn(24);
        let target: Vec<f32> = (0..24).map(|i| i as f32 / 8.0 - 1.0).collect();
        for steps in [1, 4, 20] {
            let timetable = FlowMatchEuler::nitro_e().timetable(steps).unwrap();
            let mut previews = 0;
            let sample = Euler::new(&timetable)
                .run(noise.clone(), 2, towards(&target, &noise), |step| {
                    assert_eq!((step.i, step.total, step.batch), (previews, steps, 2));
                    previews += 1;
                    // On a straight flow every preview already shows the target.
                    for (x0, target) in step.denoised.iter().zip(&target) {
                        assert!((x0 - target).abs() < 1e-5);
                    }
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!(previews, steps);
            for (x, target) in sample.iter().zip(&target) {
                assert!((x - target).abs() < 1e-5, "{x} {target}");
            }
        }
    }

    #[test]
    fn the_callback_can_stop_the_run() {
        let timetable = FlowMatchEuler::nitro_e().timetable(10).unwrap();
        let mut calls = 0;
        let stopped = Euler::new(&timetable).run(
            vec![0.0; 4],
            1,
            |x: &[f32], _| {
                calls += 1;
                Ok::<_, Infallible>(x.to_vec())
            },
            |step| {
                if step.i == 2 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        assert!(matches!(
            stopped,
            Err(SampleError::Cancelled {
                completed: 3,
                total: 10
            })
        ));
        assert_eq!(calls, 3);
    }

    #[test]
    fn image_to_image_keeps_the_image_in_proportion() {
        let image = vec![2.0; 8];
        let noise = CpuGenerator::new(5).randn(8);
        let full = FlowMatchEuler::nitro_e().timetable(4).unwrap();
        assert_eq!(
            image_to_image_start(&image, &noise, &full).unwrap(),
            noise,
            "strength 1 forgets the image"
        );
        let half = full.for_strength(0.5).unwrap();
        let start = image_to_image_start(&image, &noise, &half).unwrap();
        let sigma = half.sigmas()[0];
        for ((x, noise), image) in start.iter().zip(&noise).zip(&image) {
            assert!((x - (sigma * noise + (1.0 - sigma) * image)).abs() < 1e-6);
        }
        // A denoiser that knows the image brings it back.
        let back = Euler::new(&half)
            .run(start, 1, towards(&image, &noise), go_on)
            .unwrap();
        assert!(back.iter().all(|x| (x - 2.0).abs() < 1e-5));
    }

    #[test]
    fn inpainting_leaves_the_kept_part_exactly_as_it_was() {
        let timetable = FlowMatchEuler::nitro_e().timetable(5).unwrap();
        let noise = CpuGenerator::new(8).randn(16);
        let image: Vec<f32> = (0..16).map(|i| i as f32).collect();
        // Two channels of a 2x2 plane, two samples; paint the first two positions.
        let mask = expand_mask(&[1.0, 1.0, 0.0, 0.0], 2, 2);
        let painted = vec![-7.0; 16];
        let sampler = Euler::new(&timetable).inpaint(Inpaint {
            image: &image,
            noise: &noise,
            mask: &mask,
        });
        let mut first = None;
        let result = sampler
            .run(noise.clone(), 2, towards(&painted, &noise), |step| {
                first.get_or_insert((step.sigma_next, step.latents.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        for (i, x) in result.iter().enumerate() {
            if mask[i] == 0.0 {
                assert_eq!(*x, image[i]);
            } else {
                assert!((x + 7.0).abs() < 1e-5);
            }
        }
        // In between, the kept part carries the noise of the level reached.
        let (sigma, latents) = first.unwrap();
        assert_eq!(latents[3], sigma * noise[3] + (1.0 - sigma) * image[3]);
    }

    #[test]
    fn a_trajectory_makes_the_steps_of_a_run() {
        let timetable = FlowMatchEuler::nitro_e().timetable(6).unwrap();
        let noise = CpuGenerator::new(2).randn(16);
        let field =
            |x: &[f32], t: f32| -> Vec<f32> { x.iter().map(|x| (x + t / 1000.0).sin()).collect() };
        let kept = Kept {
            image: vec![0.5; 16],
            noise: noise.clone(),
            mask: expand_mask(&[1.0, 0.0, 1.0, 1.0], 4, 1),
        };
        let run = Euler::new(&timetable)
            .inpaint(Inpaint {
                image: &kept.image,
                noise: &kept.noise,
                mask: &kept.mask,
            })
            .run(
                noise.clone(),
                1,
                |x: &[f32], t| Ok::<_, Infallible>(field(x, t)),
                go_on,
            )
            .unwrap();
        let mut sample = Trajectory::new(timetable, noise, Some(kept)).unwrap();
        while let Some(timestep) = sample.timestep() {
            let velocity = field(sample.latents(), timestep);
            assert!(sample.advance(&velocity[1..]).is_err());
            sample.advance(&velocity).unwrap();
        }
        assert_eq!((sample.completed(), sample.latents()), (6, run.as_slice()));
        sample.advance(&[0.0; 16]).unwrap();
        assert_eq!((sample.completed(), sample.latents()), (6, run.as_slice()));
    }

    #[test]
    fn wrong_sizes_and_failures_are_told_apart() {
        let timetable = FlowMatchEuler::nitro_e().timetable(2).unwrap();
        let sampler = Euler::new(&timetable);
        let same = |x: &[f32], _: f32| Ok::<_, Infallible>(x.to_vec());
        for batch in [0, 3] {
            assert!(matches!(
                sampler.run(vec![0.0; 4], batch, same, go_on),
                Err(SampleError::Invalid(Error::Batch { len: 4, .. }))
            ));
        }
        let short = sampler.run(
            vec![0.0; 4],
            1,
            |x: &[f32], _| Ok::<_, Infallible>(x[1..].to_vec()),
            go_on,
        );
        assert!(matches!(
            short,
            Err(SampleError::Invalid(Error::Length { got: 3, .. }))
        ));
        let failed = sampler.run(
            vec![0.0; 4],
            1,
            |_: &[f32], _| Err(Error::NoSteps { steps: 9 }),
            go_on,
        );
        assert!(matches!(failed, Err(SampleError::Denoiser { step: 0, .. })));
        let misfit = sampler
            .inpaint(Inpaint {
                image: &[0.0; 4],
                noise: &[0.0; 4],
                mask: &[0.0; 1],
            })
            .run(vec![0.0; 4], 1, same, go_on);
        assert!(matches!(
            misfit,
            Err(SampleError::Invalid(Error::Length {
                what: "inpainting mask",
                ..
            }))
        ));
    }
}
