//! Rewards to advantages: each sample against the others of its prompt.

use super::config::AdvantageStd;
use crate::rewards::mean_and_spread;

/// Added to standard deviations, as in flow_grpo's `stat_tracking.py`.
const EPS: f64 = 1e-4;

/// The advantages of a rollout.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Advantages {
    /// One for each sample.
    pub(crate) values: Vec<f32>,
    /// Share of groups whose rewards are all equal: they teach nothing.
    pub(crate) zero_spread: f64,
    /// Mean over groups of the standard deviation within.
    pub(crate) spread: f64,
}

/// `(reward - mean of its group) / (standard deviation + 1e-4)`, cut at `clip`; sample `i` belongs to
/// group `i % groups`.
pub(crate) fn advantages(
    rewards: &[f64],
    groups: usize,
    std: AdvantageStd,
    clip: f32,
) -> Advantages {
    let global = mean_and_spread(rewards).1;
    let stats: Vec<(f64, f64)> = (0..groups)
        .map(|group| {
            let own: Vec<f64> = rewards
                .iter()
                .skip(group)
                .step_by(groups)
                .copied()
                .collect();
            mean_and_spread(&own)
        })
        .collect();
    let value = |(i, reward): (usize, &f64)| {
        let (mean, spread) = stats[i % groups];
        let divisor = match std {
            AdvantageStd::Global => global,
            AdvantageStd::Group => spread,
        };
        (((reward - mean) / (divisor + EPS)) as f32).clamp(-clip, clip)
    };
    let count = groups.max(1) as f64;
    Advantages {
        values: rewards.iter().enumerate().map(value).collect(),
        zero_spread: stats.iter().filter(|(_, s)| *s < 1e-9).count() as f64 / count,
        spread: stats.iter().map(|(_, s)| s).sum::<f64>() / count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_compared_within_their_group() {
        // Two groups, interleaved: (0, 1, 0, 1) and (5, 5, 5, 5).
        let rewards = [0.0, 5.0, 1.0, 5.0, 0.0, 5.0, 1.0, 5.0];
        let group = advantages(&rewards, 2, AdvantageStd::Group, 5.0);
        let expected = 0.5 / 0.5001;
        for (i, value) in group.values.iter().enumerate() {
            let sign = [-1.0, 0.0, 1.0, 0.0][i % 4];
            assert!((f64::from(*value) - sign * expected).abs() < 1e-6);
        }
        assert_eq!((group.zero_spread, group.spread), (0.5, 0.25));
        let global = advantages(&rewards, 2, AdvantageStd::Global, 5.0);
        assert!(
            global.values[2] < 0.3,
            "the spread over all groups is larger"
        );
        let clipped = advantages(&rewards, 2, AdvantageStd::Group, 0.1);
        assert_eq!(clipped.values[0], -0.1);
    }
}
