//! The objective and its gradient at one sampling step, in closed form.
//!
//! The mean of a step is linear in the velocity, so everything from the velocity on is a short
//! formula: log-probability, ratio, clipped objective, divergence from the reference. It is computed
//! on plain numbers by the functions that the rollout used, which is why an unchanged policy has a
//! ratio of exactly 1; only the model itself is differentiated automatically, from the gradient with
//! respect to its velocity that [`Objective::step`] gives. Source: Flow-GRPO (arXiv 2505.05470, eq. 4
//! to 8), PPO's clipped surrogate.

use nitro_diffusion::sde::Transition;

use crate::TrainError;

/// The constants of the objective.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Objective {
    pub(crate) clip_range: f32,
    pub(crate) kl_beta: f32,
}

/// One batch at one step.
pub(crate) struct StepInputs<'a> {
    pub(crate) transition: Transition,
    /// Latents before the step, `batch * n` values.
    pub(crate) latents: &'a [f32],
    /// Latents after it.
    pub(crate) next: &'a [f32],
    /// The policy's guided velocity.
    pub(crate) velocity: &'a [f32],
    /// The reference's, where its divergence is wanted.
    pub(crate) reference: Option<&'a [f32]>,
    /// The rollout's log-probability of each sample.
    pub(crate) log_probs: &'a [f32],
    /// The advantage of each sample.
    pub(crate) advantages: &'a [f32],
}

/// Sums over the samples of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct StepSums {
    pub(crate) samples: f64,
    pub(crate) loss: f64,
    /// Half the squared change of the log-probability: flow_grpo's `approx_kl` to the rollout.
    pub(crate) approx_kl: f64,
    /// Samples whose ratio left the clip range.
    pub(crate) clipped: f64,
    /// Divergence from the reference, and the samples it was measured on.
    pub(crate) kl: f64,
    pub(crate) kl_samples: f64,
    /// Largest distance of a ratio from 1.
    pub(crate) deviation: f64,
}

impl StepSums {
    pub(crate) fn add(&mut self, other: Self) {
        self.samples += other.samples;
        self.loss += other.loss;
        self.approx_kl += other.approx_kl;
        self.clipped += other.clipped;
        self.kl += other.kl;
        self.kl_samples += other.kl_samples;
        self.deviation = self.deviation.max(other.deviation);
    }
}

impl Objective {
    /// The sums over the batch, and the gradient of the summed loss with respect to the velocity.
    ///
    /// Per sample, with `D` elements: `ratio = exp(log_prob - rollout's)`, loss
    /// `max(-A ratio, -A clip(ratio)) + beta KL`, and `KL = sum (mean - reference mean)^2 / (2 std^2 D)`,
    /// that of two Gaussians of equal width, averaged over elements like the log-probability.
    pub(crate) fn step(&self, inputs: &StepInputs<'_>) -> Result<(StepSums, Vec<f32>), TrainError> {
        let transition = inputs.transition;
        let batch = inputs.advantages.len().max(1);
        let each = inputs.velocity.len() / batch;
        let mean = transition.mean(inputs.latents, inputs.velocity)?;
        let reference = match inputs.reference {
            Some(velocity) => Some(transition.mean(inputs.latents, velocity)?),
            None => None,
        };
        // d mean / d velocity, over variance and elements: the factor of all gradients.
        let factor = transition.velocity / (transition.std * transition.std * each as f32);
        let mut sums = StepSums::default();
        let mut grad = vec![0.0; mean.len()];
        for (i, grad) in grad.chunks_mut(each).enumerate() {
            let part = i * each..(i + 1) * each;
            let (mean, next) = (&mean[part.clone()], &inputs.next[part.clone()]);
            let advantage = inputs.advantages[i];
            let change = transition.log_prob(mean, next) - inputs.log_probs[i];
            let ratio = change.exp();
            let clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range);
            let (free, bound) = (-advantage * ratio, -advantage * clipped);
            sums.samples += 1.0;
            sums.loss += f64::from(free.max(bound));
            sums.approx_kl += f64::from(0.5 * change * change);
            sums.clipped += f64::from(u8::from((ratio - 1.0).abs() > self.clip_range));
            sums.deviation = sums.deviation.max(f64::from((ratio - 1.0).abs()));
            // Where the bound decides, the ratio has no influence.
            let towards = if free >= bound { free } else { 0.0 };
            for ((grad, mean), next) in grad.iter_mut().zip(mean).zip(next) {
                *grad = towards * factor * (next - mean);
            }
            let Some(reference) = &reference else {
                continue;
            };
            let variance = transition.std * transition.std;
            let mut kl = 0.0;
            for ((grad, mean), reference) in grad.iter_mut().zip(mean).zip(&reference[part]) {
                let apart = mean - reference;
                kl += f64::from(apart * apart / (2.0 * variance));
                *grad += self.kl_beta * factor * apart;
            }
            kl /= each as f64;
            sums.kl += kl;
            sums.kl_samples += 1.0;
            sums.loss += f64::from(self.kl_beta) * kl;
        }
        Ok((sums, grad))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nitro_diffusion::noise::CpuGenerator;

    const TRANSITION: Transition = Transition {
        latents: 0.9,
        velocity: -0.2,
        std: 0.3,
    };
    const EACH: usize = 32;

    struct Case {
        latents: Vec<f32>,
        next: Vec<f32>,
        velocity: Vec<f32>,
        reference: Vec<f32>,
    }

    fn case() -> Case {
        let mut rng = CpuGenerator::new(4);
        let latents = rng.randn(3 * EACH);
        let velocity = rng.randn(3 * EACH);
        let reference = rng.normal(3 * EACH, 0.0, 0.5);
        let mean = TRANSITION.mean(&latents, &velocity).unwrap();
        let noise = rng.randn(3 * EACH);
        let next = mean.iter().zip(noise).map(|(m, n)| m + 0.3 * n).collect();
        Case {
            latents,
            next,
            velocity,
            reference,
        }
    }

    fn evaluate(
        case: &Case,
        velocity: &[f32],
        log_probs: &[f32],
        objective: Objective,
    ) -> (StepSums, Vec<f32>) {
        let inputs = StepInputs {
            transition: TRANSITION,
            latents: &case.latents,
            next: &case.next,
            velocity,
            reference: Some(&case.reference),
            log_probs,
            advantages: &[1.5, -2.0, 0.5],
        };
        objective.step(&inputs).unwrap()
    }

    fn log_probs(case: &Case) -> Vec<f32> {
        let mean = TRANSITION.mean(&case.latents, &case.velocity).unwrap();
        let pairs = mean.chunks(EACH).zip(case.next.chunks(EACH));
        pairs.map(|(m, n)| TRANSITION.log_prob(m, n)).collect()
    }

    #[test]
    fn an_unchanged_policy_has_a_ratio_of_exactly_one() {
        let case = case();
        let objective = Objective {
            clip_range: 1e-4,
            kl_beta: 0.0,
        };
        let (sums, _) = evaluate(&case, &case.velocity, &log_probs(&case), objective);
        assert_eq!(sums.deviation, 0.0);
        assert_eq!((sums.clipped, sums.approx_kl), (0.0, 0.0));
        assert_eq!(sums.loss, -1.5 + 2.0 - 0.5);
        assert!(sums.kl > 0.0 && sums.kl_samples == 3.0);
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let case = case();
        let objective = Objective {
            clip_range: 10.0,
            kl_beta: 0.3,
        };
        // Off the policy, so that ratios differ from 1.
        let old: Vec<f32> = log_probs(&case).iter().map(|l| l + 0.1).collect();
        let (_, grad) = evaluate(&case, &case.velocity, &old, objective);
        for i in [0, 7, EACH + 3, 2 * EACH + 30] {
            let at = |by: f32| {
                let mut velocity = case.velocity.clone();
                velocity[i] += by;
                evaluate(&case, &velocity, &old, objective).0.loss
            };
            let numeric = (at(0.05) - at(-0.05)) / 0.1;
            let error = (numeric - f64::from(grad[i])).abs();
            assert!(
                error < 0.02 * numeric.abs() + 1e-4,
                "{i}: {numeric} {}",
                grad[i]
            );
        }
    }

    #[test]
    fn ratios_beyond_the_clip_range_give_no_gradient_in_the_direction_they_went() {
        let case = case();
        let objective = Objective {
            clip_range: 0.01,
            kl_beta: 0.0,
        };
        // All ratios become exp(0.1): above the range.
        let old: Vec<f32> = log_probs(&case).iter().map(|l| l - 0.1).collect();
        let (sums, grad) = evaluate(&case, &case.velocity, &old, objective);
        assert_eq!(sums.clipped, 3.0);
        let zero = |part: &[f32]| part.iter().all(|g| *g == 0.0);
        assert!(
            zero(&grad[..EACH]),
            "a good sample is likely enough already"
        );
        assert!(
            !zero(&grad[EACH..2 * EACH]),
            "a bad one must become less likely"
        );
    }
}
