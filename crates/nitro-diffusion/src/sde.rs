//! Stochastic sampling with exact log-probabilities: what policy optimisation needs of a flow model.
//!
//! A step from noise level `s` to `s'` draws the next latents from a Gaussian with mean
//! `a x + b v` and standard deviation `d`, where `x` are the latents and `v` is the velocity. Two
//! ways to choose the three numbers are known; both leave the marginals of the flow unchanged in the
//! limit of small steps, and both become the Euler step of the ODE, to the bit, when the noise level
//! is 0:
//!
//! - [`Stochasticity::Sde`], Flow-GRPO (arXiv 2505.05470, eq. 9; yifan123/flow_grpo,
//!   `sd3_sde_with_logprob.py`): the reverse-time SDE with diffusion `eta sqrt(s / (1 - s))`.
//! - [`Stochasticity::Cps`], coefficients-preserving sampling (arXiv 2509.05952; the later presets
//!   of the same repository): part of the noise that the step would keep is drawn anew, so that the
//!   shares of data and noise are those of the flow at every step.

use serde::{Deserialize, Serialize};

use crate::noise::CpuGenerator;
use crate::sampler::SampleError;
use crate::schedule::Timetable;
use crate::{Error, Result};

/// Where a sampling run draws its noise from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Stochasticity {
    /// The reverse-time SDE of the flow; flow_grpo's level is 0.7, DanceGRPO's 0.3.
    Sde {
        /// `eta`: 0 is the ODE.
        level: f32,
    },
    /// Coefficients-preserving sampling; flow_grpo's level is 0.8.
    Cps {
        /// 0 is the ODE, 1 redraws all noise.
        level: f32,
    },
}

impl Stochasticity {
    fn level(self) -> f32 {
        match self {
            Self::Sde { level } | Self::Cps { level } => level,
        }
    }

    /// The distribution of step `i` of `timetable`.
    ///
    /// # Errors
    /// When the timetable has no step `i`, or the level is negative, not finite, or (for
    /// [`Stochasticity::Cps`]) above 1.
    pub fn transition(self, timetable: &Timetable, i: usize) -> Result<Transition> {
        let level = f64::from(self.level());
        let most = match self {
            Self::Sde { .. } => f64::MAX,
            Self::Cps { .. } => 1.0,
        };
        if !(0.0..=most).contains(&level) {
            return Err(Error::NoiseLevel {
                level: self.level(),
            });
        }
        let sigmas = timetable.sigmas();
        let (Some(&sigma), Some(&next)) = (sigmas.get(i), sigmas.get(i + 1)) else {
            return Err(no_step(timetable, i));
        };
        if level == 0.0 {
            return Ok(Transition::ode(sigma, next));
        }
        let (s, n) = (f64::from(sigma), f64::from(next));
        let (latents, velocity, std) = match self {
            Self::Sde { .. } => {
                // At pure noise the coefficient is infinite: the next level stands in, as in the
                // reference.
                let below = if sigma == 1.0 {
                    sigmas.get(1).copied().map_or(s, f64::from)
                } else {
                    s
                };
                let variance = level * level * s / (1.0 - below);
                let dt = n - s;
                (
                    1.0 + variance / (2.0 * s) * dt,
                    (1.0 + variance * (1.0 - s) / (2.0 * s)) * dt,
                    (variance * -dt).sqrt(),
                )
            }
            Self::Cps { .. } => {
                let std = n * (level * std::f64::consts::FRAC_PI_2).sin();
                // x0 = x - s v and noise = x + (1 - s) v, mixed anew.
                let kept = (n * n - std * std).max(0.0).sqrt();
                (1.0 - n + kept, kept * (1.0 - s) - (1.0 - n) * s, std)
            }
        };
        Ok(Transition {
            latents: latents as f32,
            velocity: velocity as f32,
            std: std as f32,
        })
    }
}

/// One step's Gaussian: mean `latents * x + velocity * v`, standard deviation `std`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transition {
    /// Coefficient of the latents.
    pub latents: f32,
    /// Coefficient of the velocity.
    pub velocity: f32,
    /// Standard deviation of every element; 0 is a deterministic step without a log-probability.
    pub std: f32,
}

impl Transition {
    /// The Euler step of the ODE between two noise levels.
    pub fn ode(sigma: f32, next: f32) -> Self {
        Self {
            latents: 1.0,
            velocity: next - sigma,
            std: 0.0,
        }
    }

    /// Whether the step draws noise.
    pub fn is_stochastic(&self) -> bool {
        self.std > 0.0
    }

    /// The mean of the next latents.
    ///
    /// # Errors
    /// When the slices differ in length.
    pub fn mean(&self, latents: &[f32], velocity: &[f32]) -> Result<Vec<f32>> {
        if latents.len() != velocity.len() {
            return Err(Error::Length {
                what: "the velocity of a transition",
                got: velocity.len(),
                expected: latents.len(),
            });
        }
        let mean = latents
            .iter()
            .zip(velocity)
            .map(|(x, v)| self.latents * x + self.velocity * v);
        Ok(mean.collect())
    }

    /// The log-density of `next` given the `mean`, averaged over the elements of one sample. Terms
    /// are `f32`, their sum `f64`.
    ///
    /// A deterministic step has no density; it gives 0.
    pub fn log_prob(&self, mean: &[f32], next: &[f32]) -> f32 {
        if !self.is_stochastic() || mean.is_empty() {
            return 0.0;
        }
        let scale = 2.0 * self.std * self.std;
        let sum: f64 = mean
            .iter()
            .zip(next)
            .map(|(mean, next)| {
                let apart = next - mean;
                f64::from(apart * apart / scale)
            })
            .sum();
        let constant = f64::from(self.std).ln() + 0.5 * std::f64::consts::TAU.ln();
        (-sum / mean.len() as f64 - constant) as f32
    }
}

/// A sampling run with all that went on in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Trajectory {
    /// Latents before each step, and the clean ones at the end: `steps + 1` times `batch * n`.
    pub states: Vec<Vec<f32>>,
    /// For each step the log-probability of every sample; empty for a deterministic step.
    pub log_probs: Vec<Vec<f32>>,
}

impl Trajectory {
    /// The clean latents.
    pub fn clean(&self) -> &[f32] {
        self.states.last().map_or(&[], Vec::as_slice)
    }
}

/// Samples along the noise levels of a timetable, drawing noise in some of the steps.
#[derive(Debug, Clone)]
pub struct Sampler<'a> {
    timetable: &'a Timetable,
    stochasticity: Stochasticity,
    window: std::ops::Range<usize>,
}

impl<'a> Sampler<'a> {
    /// Draws noise in every step.
    pub fn new(timetable: &'a Timetable, stochasticity: Stochasticity) -> Self {
        Self {
            timetable,
            stochasticity,
            window: 0..timetable.len(),
        }
    }

    /// Draws noise in these steps only; the others follow the ODE.
    pub fn window(mut self, steps: std::ops::Range<usize>) -> Self {
        self.window = steps;
        self
    }

    /// The distribution of step `i`.
    ///
    /// # Errors
    /// As [`Stochasticity::transition`].
    pub fn transition(&self, i: usize) -> Result<Transition> {
        if self.window.contains(&i) {
            return self.stochasticity.transition(self.timetable, i);
        }
        match self.timetable.sigmas().get(i..i + 2) {
            Some(&[sigma, next]) => Ok(Transition::ode(sigma, next)),
            _ => Err(no_step(self.timetable, i)),
        }
    }

    /// Runs all steps from `latents`, one sample per generator.
    ///
    /// A sample's noise comes from its own generator alone, so it does not depend on the batch.
    ///
    /// # Errors
    /// When sizes do not fit, or the denoiser fails.
    pub fn run<E: std::error::Error + 'static>(
        &self,
        latents: Vec<f32>,
        generators: &mut [CpuGenerator],
        mut denoise: impl FnMut(&[f32], f32) -> Result<Vec<f32>, E>,
    ) -> Result<Trajectory, SampleError<E>> {
        let (len, batch) = (latents.len(), generators.len());
        if batch == 0 || !len.is_multiple_of(batch) || len == 0 {
            return Err(Error::Batch { len, batch }.into());
        }
        let each = len / batch;
        let total = self.timetable.len();
        let mut trajectory = Trajectory {
            states: vec![latents],
            log_probs: Vec::with_capacity(total),
        };
        for (step, &timestep) in self.timetable.timesteps().iter().enumerate() {
            let latents = &trajectory.states[step];
            let velocity = denoise(latents, timestep).map_err(|source| SampleError::Denoiser {
                step,
                total,
                source,
            })?;
            let transition = self.transition(step)?;
            let mean = transition.mean(latents, &velocity)?;
            if !transition.is_stochastic() {
                trajectory.states.push(mean);
                trajectory.log_probs.push(Vec::new());
                continue;
            }
            let mut next = mean.clone();
            for (next, generator) in next.chunks_mut(each).zip(generators.iter_mut()) {
                for (x, noise) in next.iter_mut().zip(generator.randn(each)) {
                    *x += transition.std * noise;
                }
            }
            let log_probs = mean.chunks(each).zip(next.chunks(each));
            let log_probs = log_probs.map(|(mean, next)| transition.log_prob(mean, next));
            trajectory.log_probs.push(log_probs.collect());
            trajectory.states.push(next);
        }
        Ok(trajectory)
    }
}

fn no_step(timetable: &Timetable, i: usize) -> Error {
    Error::Length {
        what: "the timetable",
        got: timetable.len(),
        expected: i + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Euler;
    use crate::schedule::FlowMatchEuler;
    use std::convert::Infallible;
    use std::ops::ControlFlow;

    const BOTH: [fn(f32) -> Stochasticity; 2] = [
        |level| Stochasticity::Sde { level },
        |level| Stochasticity::Cps { level },
    ];

    fn timetable(steps: usize) -> Timetable {
        FlowMatchEuler::nitro_e().timetable(steps).unwrap()
    }

    /// Something without structure, to show every bit of an error.
    fn wild(x: &[f32], timestep: f32) -> Result<Vec<f32>, Infallible> {
        Ok(x.iter().map(|x| (3.0 * x + timestep).sin() - x).collect())
    }

    #[test]
    fn without_noise_it_is_the_ode_to_the_bit() {
        let timetable = timetable(10);
        let start = CpuGenerator::new(1).randn(48);
        let ode = Euler::new(&timetable)
            .run(start.clone(), 3, wild, |_| ControlFlow::Continue(()))
            .unwrap();
        for kind in BOTH {
            let mut generators: Vec<_> = (0..3).map(CpuGenerator::new).collect();
            let run = Sampler::new(&timetable, kind(0.0))
                .run(start.clone(), &mut generators, wild)
                .unwrap();
            assert_eq!(run.clean(), ode);
            assert!(run.log_probs.iter().all(Vec::is_empty));
        }
        // Noise in no step at all is the same thing.
        let mut generators: Vec<_> = (0..3).map(CpuGenerator::new).collect();
        let run = Sampler::new(&timetable, BOTH[0](0.7))
            .window(0..0)
            .run(start, &mut generators, wild)
            .unwrap();
        assert_eq!(run.clean(), ode);
    }

    /// For data `N(1.5, 0.25)` the velocity is known exactly, so samples must have that mean and
    /// variance whatever noise was drawn on the way.
    #[test]
    fn noise_leaves_the_distribution_of_the_samples_alone() {
        let (mean, variance) = (1.5_f32, 0.25_f32);
        let timetable = timetable(200);
        let velocity = |x: &[f32], timestep: f32| {
            let s = timestep / 1000.0;
            let spread = (1.0 - s).powi(2) * variance + s * s;
            let one = |x: &f32| {
                let apart = (x - (1.0 - s) * mean) / spread;
                // E[noise - data | x]
                s * apart - (mean + (1.0 - s) * variance * apart)
            };
            Ok::<_, Infallible>(x.iter().map(one).collect())
        };
        for kind in [BOTH[0](0.7), BOTH[0](0.3), BOTH[1](0.2)] {
            let start = CpuGenerator::new(7).randn(4096);
            let run = Sampler::new(&timetable, kind)
                .run(start, &mut [CpuGenerator::new(8)], velocity)
                .unwrap();
            let n = run.clean().len() as f32;
            let m = run.clean().iter().sum::<f32>() / n;
            let v = run.clean().iter().map(|x| (x - m).powi(2)).sum::<f32>() / n;
            assert!((m - mean).abs() < 0.04, "{kind:?}: mean {m}");
            assert!((v - variance).abs() < 0.04, "{kind:?}: variance {v}");
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_gaussian() {
        let transition = Transition {
            latents: 1.0,
            velocity: 0.0,
            std: 0.5,
        };
        // ln N(0.5; 0, 0.5^2) and ln N(0; 0, 0.5^2), averaged.
        let at = |z: f64| -z * z / 2.0 - (0.5_f64 * std::f64::consts::TAU.sqrt()).ln();
        let expected = (at(1.0) + at(0.0)) / 2.0;
        let got = transition.log_prob(&[0.0, 3.0], &[0.5, 3.0]);
        assert!((f64::from(got) - expected).abs() < 1e-6, "{got} {expected}");
    }

    #[test]
    fn a_run_reports_what_its_transitions_give() {
        let timetable = timetable(5);
        let sampler = Sampler::new(&timetable, BOTH[0](0.7)).window(1..3);
        let start = CpuGenerator::new(2).randn(32);
        let mut generators: Vec<_> = (0..2).map(CpuGenerator::new).collect();
        let run = sampler.run(start, &mut generators, wild).unwrap();
        for step in 0..5 {
            let transition = sampler.transition(step).unwrap();
            assert_eq!(transition.is_stochastic(), (1..3).contains(&step));
            assert_eq!(run.log_probs[step].is_empty(), !(1..3).contains(&step));
            let x = &run.states[step];
            let velocity = wild(x, timetable.timesteps()[step]).unwrap();
            let mean = transition.mean(x, &velocity).unwrap();
            for (i, log_prob) in run.log_probs[step].iter().enumerate() {
                let part = i * 16..(i + 1) * 16;
                let again =
                    transition.log_prob(&mean[part.clone()], &run.states[step + 1][part.clone()]);
                assert_eq!(again, *log_prob);
            }
        }
    }

    /// flow_grpo's formulas, term by term, at one level in the middle.
    #[test]
    fn coefficients_are_the_references() {
        let timetable = timetable(10);
        let (s, n) = (timetable.sigmas()[3], timetable.sigmas()[4]);
        let (eta, dt) = (0.7_f32, n - s);
        let std = (s / (1.0 - s)).sqrt() * eta;
        let got = BOTH[0](eta).transition(&timetable, 3).unwrap();
        assert!((got.latents - (1.0 + std * std / (2.0 * s) * dt)).abs() < 1e-6);
        let velocity = (1.0 + std * std * (1.0 - s) / (2.0 * s)) * dt;
        assert!((got.velocity - velocity).abs() < 1e-6);
        assert!((got.std - std * (-dt).sqrt()).abs() < 1e-6);
        // At sigma 1 the next level stands in for it.
        let first = BOTH[0](eta).transition(&timetable, 0).unwrap();
        let below = timetable.sigmas()[1];
        let std = eta * (1.0 / (1.0 - below)).sqrt() * (1.0 - below).sqrt();
        assert!((first.std - std).abs() < 1e-6);
    }

    #[test]
    fn bad_requests_are_refused() {
        let timetable = timetable(3);
        for (kind, level) in [(0, -0.1), (0, f32::NAN), (1, 1.5)] {
            let refused = BOTH[kind](level).transition(&timetable, 0);
            assert!(matches!(refused, Err(Error::NoiseLevel { .. })), "{level}");
        }
        assert!(BOTH[0](0.7).transition(&timetable, 3).is_err());
        let sampler = Sampler::new(&timetable, BOTH[0](0.7));
        assert!(sampler.run(vec![0.0; 5], &mut [], wild).is_err());
    }
}
