//! Notices a policy that is being lost, before hours are spent on it.

use super::config::CollapseConfig;

/// What is looked at after each rollout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Vitals {
    pub(crate) reward: f64,
    /// Share of groups without spread in reward.
    pub(crate) zero_spread: f64,
    /// Mean standard deviation of a pixel within a group.
    pub(crate) diversity: f64,
    pub(crate) kl: f64,
}

/// The vitals of all rollouts so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct History {
    rows: Vec<Vitals>,
}

impl History {
    /// As a buffer of a checkpoint, which is what makes a resumed run notice the same.
    pub(crate) fn to_buffer(&self) -> Vec<f32> {
        let row = |v: &Vitals| [v.reward, v.zero_spread, v.diversity, v.kl].map(|x| x as f32);
        self.rows.iter().flat_map(row).collect()
    }

    /// Back from a buffer.
    pub(crate) fn from_buffer(buffer: &[f32]) -> Self {
        let row = |row: &[f32]| Vitals {
            reward: row[0].into(),
            zero_spread: row[1].into(),
            diversity: row[2].into(),
            kl: row[3].into(),
        };
        Self {
            rows: buffer.chunks_exact(4).map(row).collect(),
        }
    }

    /// Adds a rollout, as precisely as a checkpoint keeps it.
    pub(crate) fn push(&mut self, vitals: Vitals) {
        let row = Self { rows: vec![vitals] };
        self.rows.extend(Self::from_buffer(&row.to_buffer()).rows);
    }

    /// Why to stop, if there is a reason.
    pub(crate) fn collapsed(&self, config: &CollapseConfig) -> Option<String> {
        let window = config.window.max(1);
        let last = self.rows.last()?;
        if [last.reward, last.diversity, last.kl]
            .iter()
            .any(|x| !x.is_finite())
        {
            return Some("rewards or pictures are not finite; lower run.optimizer.lr".into());
        }
        if self.rows.len() < 2 * window {
            return None;
        }
        let mean = |rows: &[Vitals], of: fn(&Vitals) -> f64| {
            rows.iter().map(of).sum::<f64>() / rows.len() as f64
        };
        let recent = &self.rows[self.rows.len() - window..];
        let over = |of| mean(recent, of);
        let first = &self.rows[..window];

        let best = self
            .rows
            .windows(window)
            .map(|rows| mean(rows, |v| v.reward))
            .fold(f64::NEG_INFINITY, f64::max);
        let reward = over(|v| v.reward);
        let allowed = config.reward_drop * best.abs();
        if best - reward > allowed {
            return Some(format!(
                "the reward fell to {reward:.3} over the last {window} rollouts, from {best:.3} at its \
                 best; lower run.optimizer.lr or run.gradient_clip, or raise task.kl_beta"
            ));
        }
        let zero_spread = over(|v| v.zero_spread);
        if zero_spread > config.zero_spread {
            return Some(format!(
                "{:.0} % of groups have samples of one and the same reward ({reward:.3}): nothing is \
                 left to learn from; use harder prompts or a finer reward",
                100.0 * zero_spread
            ));
        }
        let (had, has) = (mean(first, |v| v.diversity), over(|v| v.diversity));
        if has < config.diversity * had {
            return Some(format!(
                "pictures of one prompt vary by {has:.2} levels, at first by {had:.2}: the policy \
                 paints one picture; raise task.kl_beta"
            ));
        }
        let kl = over(|v| v.kl);
        if kl > config.kl {
            return Some(format!(
                "the divergence from the reference is {kl:.3}, more than {}; raise task.kl_beta",
                config.kl
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: CollapseConfig = CollapseConfig {
        window: 3,
        reward_drop: 0.3,
        zero_spread: 0.9,
        diversity: 0.5,
        kl: 0.5,
    };
    const GOOD: Vitals = Vitals {
        reward: 0.5,
        zero_spread: 0.2,
        diversity: 30.0,
        kl: 0.01,
    };

    fn after(rows: &[Vitals]) -> Option<String> {
        let mut history = History::default();
        rows.iter().for_each(|row| history.push(*row));
        let again = History::from_buffer(&history.to_buffer());
        assert_eq!(
            again.collapsed(&CONFIG).is_some(),
            history.collapsed(&CONFIG).is_some()
        );
        history.collapsed(&CONFIG)
    }

    #[test]
    fn each_sign_is_noticed_and_named() {
        assert_eq!(after(&[GOOD; 12]), None);
        let bad = |change: fn(&mut Vitals)| {
            let mut last = GOOD;
            change(&mut last);
            after(&[[GOOD; 6], [last; 6]].concat()).unwrap_or_default()
        };
        assert!(bad(|v| v.reward = 0.3).contains("reward fell"));
        assert!(bad(|v| v.zero_spread = 0.95).contains("nothing is left"));
        assert!(bad(|v| v.diversity = 10.0).contains("one picture"));
        assert!(bad(|v| v.kl = 0.6).contains("divergence"));
        assert!(bad(|v| v.reward = f64::NAN).contains("finite"));
        assert!(
            bad(|v| v.reward = 0.4).is_empty(),
            "a small dip is no collapse"
        );
    }

    #[test]
    fn a_young_run_is_left_alone() {
        let low = Vitals {
            reward: 0.0,
            ..GOOD
        };
        assert_eq!(after(&[GOOD, GOOD, GOOD, low, low]), None);
    }
}
