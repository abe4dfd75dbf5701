//! The flow-matching Euler schedule: sigmas and timesteps for training and for sampling.
//!
//! A noisy latent at noise level `sigma` in `[0, 1]` is `(1 - sigma) * data + sigma * noise`, and
//! the model predicts the velocity `noise - data`. Timesteps are `sigma * num_train_timesteps`.
//! The tables reproduce `FlowMatchEulerDiscreteScheduler` of diffusers 0.32.2, including which parts
//! are computed in `f32` and which in `f64`.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Schedule settings with the training tables they imply.
///
/// Index `i` of the tables runs from the noisiest level (`sigma` 1) to the cleanest.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowMatchEuler {
    num_train_timesteps: usize,
    shift: f64,
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl FlowMatchEuler {
    /// Builds the training tables for `num_train_timesteps` levels.
    ///
    /// `shift` 1 leaves levels evenly spaced; larger values move them towards noise.
    pub fn new(num_train_timesteps: usize, shift: f64) -> Result<Self> {
        if num_train_timesteps == 0 {
            return Err(Error::Config {
                what: "num_train_timesteps is 0".into(),
            });
        }
        if !(shift.is_finite() && shift > 0.0) {
            return Err(Error::Config {
                what: format!("shift is {shift}"),
            });
        }
        let count = num_train_timesteps as f32;
        // Tensor arithmetic with Python scalars: every operation rounds to f32.
        let (scale, slope) = (shift as f32, (shift - 1.0) as f32);
        let sigmas: Vec<f32> = (1..=num_train_timesteps)
            .rev()
            .map(|t| {
                let sigma = t as f32 / count;
                scale * sigma / (1.0 + slope * sigma)
            })
            .collect();
        let timesteps = sigmas.iter().map(|sigma| sigma * count).collect();
        Ok(Self {
            num_train_timesteps,
            shift,
            sigmas,
            timesteps,
        })
    }

    /// The schedule every Nitro-E checkpoint was trained with: 1000 levels, shift 1.
    pub fn nitro_e() -> Self {
        Self::new(1000, 1.0).expect("constant settings are valid")
    }

    /// Number of training noise levels.
    pub fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps
    }

    /// The shift towards noise.
    pub fn shift(&self) -> f64 {
        self.shift
    }

    /// Training sigmas, noisiest first; `num_train_timesteps` values.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Training timesteps (`sigma * num_train_timesteps`), noisiest first.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The cleanest training level.
    pub fn sigma_min(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The noisiest training level.
    pub fn sigma_max(&self) -> f32 {
        self.sigmas[0]
    }

    /// The sigma of a training timestep, which must be one of [`Self::timesteps`].
    pub fn sigma_of(&self, timestep: f32) -> Result<f32> {
        lookup(&self.timesteps, &self.sigmas, timestep)
    }

    /// The training level chosen by `u` in `[0, 1)`: index `floor(u * num_train_timesteps)`.
    ///
    /// Values of `u` outside the range, which the reference rejects or wraps, go to the nearest level
    /// (a sigmoid in `f32` does reach exactly 1).
    pub fn level(&self, u: f32) -> TrainLevel {
        let last = self.num_train_timesteps - 1;
        // A float-to-integer cast saturates and maps NaN to 0.
        let index = ((u * self.num_train_timesteps as f32) as usize).min(last);
        TrainLevel {
            index,
            timestep: self.timesteps[index],
            sigma: self.sigmas[index],
        }
    }

    /// The sampling schedule of `steps` steps.
    ///
    /// Timesteps are spaced evenly (in `f64`) from the noisiest to the cleanest training level and
    /// then shifted. With a shift other than 1 the ends of that range are already shifted, so the
    /// last sigma is shifted twice: the reference does the same.
    pub fn timetable(&self, steps: usize) -> Result<Timetable> {
        if steps == 0 {
            return Err(Error::NoSteps { steps });
        }
        let count = self.num_train_timesteps as f64;
        let (first, last) = (
            f64::from(self.sigma_max()) * count,
            f64::from(self.sigma_min()) * count,
        );
        let spacing = (last - first) / (steps.max(2) - 1) as f64;
        let sigmas = (0..steps)
            .map(|i| {
                let timestep = if i > 0 && i == steps - 1 {
                    last
                } else {
                    i as f64 * spacing + first
                };
                let sigma = timestep / count;
                (self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)) as f32
            })
            .collect();
        Ok(self.with_sigmas(sigmas))
    }

    /// A sampling schedule through the given noise levels, each shifted like the built-in ones.
    ///
    /// The levels must decrease strictly within `(0, 1]`; the final 0 is added.
    pub fn timetable_from_sigmas(&self, sigmas: &[f32]) -> Result<Timetable> {
        if sigmas.is_empty() {
            return Err(Error::NoSteps { steps: 0 });
        }
        let mut above = f32::INFINITY;
        for (index, &value) in sigmas.iter().enumerate() {
            if !(value > 0.0 && value <= 1.0 && value < above) {
                return Err(Error::Sigmas { index, value });
            }
            above = value;
        }
        let (scale, slope) = (self.shift as f32, (self.shift - 1.0) as f32);
        Ok(self.with_sigmas(
            sigmas
                .iter()
                .map(|sigma| scale * sigma / (1.0 + slope * sigma))
                .collect(),
        ))
    }

    fn with_sigmas(&self, mut sigmas: Vec<f32>) -> Timetable {
        let count = self.num_train_timesteps as f32;
        let timesteps = sigmas.iter().map(|sigma| sigma * count).collect();
        sigmas.push(0.0);
        Timetable { timesteps, sigmas }
    }
}

/// One training noise level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainLevel {
    /// Position in the training tables, 0 = noisiest.
    pub index: usize,
    /// The timestep the model is conditioned on.
    pub timestep: f32,
    /// The noise level in `[0, 1]`.
    pub sigma: f32,
}

/// The noise levels one sampling run visits.
#[derive(Debug, Clone, PartialEq)]
pub struct Timetable {
    timesteps: Vec<f32>,
    sigmas: Vec<f32>,
}

impl Timetable {
    /// Number of steps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// True for a run without steps (which the constructors never make).
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// The timestep the model sees at each step.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The noise level before each step, then the final 0: `len() + 1` values.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The sigma at a timestep, which must be one of [`Self::timesteps`].
    pub fn sigma_of(&self, timestep: f32) -> Result<f32> {
        lookup(&self.timesteps, &self.sigmas, timestep)
    }

    /// The tail of the run that image-to-image with this `strength` keeps.
    ///
    /// Strength 1 keeps every step (the image is forgotten), 0.5 the last half. The count follows
    /// diffusers: the first `floor(steps - steps * strength)` steps are skipped.
    pub fn for_strength(&self, strength: f64) -> Result<Self> {
        let steps = self.len();
        let skipped = if (0.0..=1.0).contains(&strength) {
            let wanted = (steps as f64 * strength).min(steps as f64);
            (steps as f64 - wanted).max(0.0) as usize
        } else {
            steps
        };
        if skipped >= steps {
            return Err(Error::Strength {
                strength,
                steps,
                kept: 0,
            });
        }
        Ok(Self {
            timesteps: self.timesteps[skipped..].to_vec(),
            sigmas: self.sigmas[skipped..].to_vec(),
        })
    }
}

/// `(1 - sigma) * data + sigma * noise`, the forward process.
///
/// `data` and `noise` must have equal length.
pub fn add_noise(data: &[f32], noise: &[f32], sigma: f32) -> Result<Vec<f32>> {
    if noise.len() != data.len() {
        return Err(Error::Length {
            what: "noise",
            got: noise.len(),
            expected: data.len(),
        });
    }
    Ok(data
        .iter()
        .zip(noise)
        .map(|(data, noise)| sigma * noise + (1.0 - sigma) * data)
        .collect())
}

/// How the training noise level is drawn: a density over `u` in `[0, 1)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "scheme", rename_all = "snake_case")]
pub enum Density {
    /// `sigmoid(normal(mean, std))`: most weight on middle levels (Nitro-E: mean 0, std 1).
    LogitNormal {
        /// Mean of the normal.
        mean: f64,
        /// Standard deviation of the normal.
        std: f64,
    },
    /// The heavy-tailed density of the SD3 paper with mode scale `scale`.
    Mode {
        /// Positive values favour the middle, negative the ends.
        scale: f64,
    },
    /// Every level equally often.
    Uniform,
}

impl Default for Density {
    fn default() -> Self {
        Self::LogitNormal {
            mean: 0.0,
            std: 1.0,
        }
    }
}

impl Density {
    /// Draws `count` values of `u` with a torch-compatible generator.
    pub fn sample(&self, count: usize, rng: &mut crate::noise::CpuGenerator) -> Vec<f32> {
        match *self {
            Self::LogitNormal { mean, std } => rng
                .normal(count, mean, std)
                .into_iter()
                .map(sigmoid)
                .collect(),
            Self::Mode { scale } => rng
                .rand(count)
                .into_iter()
                .map(|u| {
                    let cos = (std::f32::consts::PI * u / 2.0).cos();
                    1.0 - u - scale as f32 * (cos * cos - 1.0 + u)
                })
                .collect(),
            Self::Uniform => rng.rand(count),
        }
    }
}

/// The logistic function in `f32`: what turns a normal into a logit-normal `u`.
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Weight of a training sample's loss as a function of its sigma.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossWeighting {
    /// All samples count the same (what logit-normal sampling is used with).
    #[default]
    None,
    /// `sigma^-2`.
    SigmaSqrt,
    /// `2 / (pi * (1 - 2 sigma + 2 sigma^2))`.
    Cosmap,
}

impl LossWeighting {
    /// The weight at `sigma`.
    pub fn weight(self, sigma: f32) -> f32 {
        match self {
            Self::None => 1.0,
            Self::SigmaSqrt => sigma.powi(-2),
            Self::Cosmap => {
                2.0 / (std::f32::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma))
            }
        }
    }
}

fn lookup(timesteps: &[f32], sigmas: &[f32], timestep: f32) -> Result<f32> {
    timesteps
        .iter()
        .position(|&t| t == timestep)
        .map(|i| sigmas[i])
        .ok_or(Error::UnknownTimestep {
            timestep,
            len: timesteps.len(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::CpuGenerator;

    #[test]
    fn strength_keeps_the_tail_of_the_run() {
        let full = FlowMatchEuler::nitro_e().timetable(20).unwrap();
        assert_eq!(full.for_strength(1.0).unwrap(), full);
        let half = full.for_strength(0.5).unwrap();
        assert_eq!(half.timesteps(), &full.timesteps()[10..]);
        assert_eq!(half.sigmas(), &full.sigmas()[10..]);
        // 20 - 20 * 0.33 = 13.4: thirteen steps are skipped.
        assert_eq!(full.for_strength(0.33).unwrap().len(), 7);
        for bad in [0.0, -0.1, 1.5, f64::NAN] {
            assert!(matches!(
                full.for_strength(bad),
                Err(Error::Strength { .. })
            ));
        }
    }

    #[test]
    fn bad_settings_are_refused_with_the_reason() {
        assert!(matches!(
            FlowMatchEuler::new(0, 1.0),
            Err(Error::Config { .. })
        ));
        assert!(matches!(
            FlowMatchEuler::new(10, -1.0),
            Err(Error::Config { .. })
        ));
        let schedule = FlowMatchEuler::nitro_e();
        assert_eq!(schedule.timetable(0), Err(Error::NoSteps { steps: 0 }));
        assert_eq!(
            schedule.timetable_from_sigmas(&[1.0, 0.5, 0.5]),
            Err(Error::Sigmas {
                index: 2,
                value: 0.5
            })
        );
        assert!(schedule.sigma_of(0.5).is_err());
        assert!(add_noise(&[0.0; 3], &[0.0; 2], 0.5).is_err());
    }

    #[test]
    fn u_of_exactly_one_is_the_cleanest_level() {
        let schedule = FlowMatchEuler::nitro_e();
        assert_eq!(schedule.level(1.0).index, 999);
        assert_eq!(schedule.level(-0.5).index, 0);
        assert_eq!(schedule.sigma_of(334.0).unwrap(), 0.334);
    }

    #[test]
    fn custom_sigmas_equal_to_the_built_in_ones_give_the_same_run() {
        let schedule = FlowMatchEuler::nitro_e();
        let built_in = schedule.timetable(8).unwrap();
        let custom = schedule
            .timetable_from_sigmas(&built_in.sigmas()[..8])
            .unwrap();
        assert_eq!(custom, built_in);
    }

    #[test]
    fn densities_have_the_shape_they_promise() {
        let mut rng = CpuGenerator::new(3);
        let spread = |u: &[f32]| {
            let n = u.len() as f32;
            let mean = u.iter().sum::<f32>() / n;
            (mean, u.iter().map(|u| (u - mean).powi(2)).sum::<f32>() / n)
        };
        let logit = Density::default().sample(20_000, &mut rng);
        let uniform = Density::Uniform.sample(20_000, &mut rng);
        let mode = Density::Mode { scale: 1.29 }.sample(20_000, &mut rng);
        for draws in [&logit, &uniform, &mode] {
            assert!(draws.iter().all(|u| (0.0..=1.0).contains(u)));
            assert!((spread(draws).0 - 0.5).abs() < 0.02);
        }
        // Variance of the uniform is 1/12; sigmoid of a standard normal has about 0.0434.
        assert!((spread(&uniform).1 - 1.0 / 12.0).abs() < 0.003);
        assert!((spread(&logit).1 - 0.0434).abs() < 0.003);
        assert!(spread(&mode).1 < spread(&uniform).1);
    }

    #[test]
    fn loss_weightings() {
        assert_eq!(LossWeighting::None.weight(0.2), 1.0);
        assert!((LossWeighting::SigmaSqrt.weight(0.5) - 4.0).abs() < 1e-6);
        assert!((LossWeighting::Cosmap.weight(0.5) - 4.0 / std::f32::consts::PI).abs() < 1e-6);
    }
}
