//! Rewards: pictures to numbers, by a weighted set of named scorers.

mod http;
mod judge;
mod neural;
mod pickle;

use image::RgbImage;
use nitro_eval::geneval::Metadata;
use nitro_eval::scorers::official;
use serde::{Deserialize, Serialize};

pub use self::http::HttpScorer;
pub use self::judge::JudgeScorer;
pub(crate) use self::judge::{credit, is_right};

use crate::TrainError;

/// A picture to score.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt it was made from, with what it must show.
    pub metadata: &'a Metadata,
    /// The picture.
    pub picture: &'a RgbImage,
}

/// Something that gives pictures numbers; more is better.
pub trait Scorer: Send + Sync {
    /// One number per sample.
    ///
    /// # Errors
    /// When a sample cannot be scored; the run stops rather than learn from a made-up number.
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String>;
}

/// One scorer of a reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// The name in logs.
    pub name: String,
    /// Its share in the reward; 0 only watches.
    pub weight: f64,
    /// What it is.
    pub scorer: ScorerConfig,
}

/// What a scorer is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum ScorerConfig {
    /// GenEval's rules with the exact judge of the shapes world as detector.
    Judge {
        /// Share of the reward given for being partly right (0: all or nothing). Binary rewards
        /// leave many groups without any spread.
        #[serde(default)]
        partial: f64,
    },
    /// GenEval's rules over Mask2Former, colours by CLIP ViT-L/14: 1 or 0.
    #[serde(rename = "geneval")]
    GenEval {
        /// The detector: a file, a folder or a Hub repository.
        #[serde(default = "detector")]
        detector: String,
        /// The colours' CLIP, likewise.
        #[serde(default = "clip")]
        colors: String,
    },
    /// HPSv2.1, or a CLIP of any size with its `open_clip_config.json`.
    Hps {
        /// A file, a folder or a Hub repository.
        #[serde(default = "hps")]
        model: String,
    },
    /// ImageReward.
    ImageReward {
        /// A file, a folder or a Hub repository.
        #[serde(default = "image_reward")]
        model: String,
    },
    /// A reward server in flow_grpo's protocol.
    Http {
        /// Its address, such as `http://127.0.0.1:18085`.
        url: String,
        /// The field of its answer that holds the scores.
        #[serde(default = "scores")]
        field: String,
        /// Seconds to wait for an answer.
        #[serde(default = "timeout")]
        timeout: u64,
        /// Times to ask again, a second apart, when it does not answer.
        #[serde(default = "retries")]
        retries: u32,
    },
}

fn detector() -> String {
    official::DETECTOR.into()
}

fn clip() -> String {
    official::CLIP.into()
}

fn hps() -> String {
    official::HPS.into()
}

fn image_reward() -> String {
    official::IMAGE_REWARD.into()
}

fn scores() -> String {
    "scores".into()
}

fn timeout() -> u64 {
    120
}

fn retries() -> u32 {
    30
}

/// Scores of a set of samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// The weighted sum for each sample.
    pub total: Vec<f64>,
    /// Each scorer's own numbers.
    pub parts: Vec<(String, Vec<f64>)>,
}

/// A weighted set of named scorers.
pub struct Rewards {
    scorers: Vec<(RewardConfig, Box<dyn Scorer>)>,
}

impl Rewards {
    /// Opens the scorers of a configuration.
    pub fn open(configs: &[RewardConfig]) -> Result<Self, TrainError> {
        let mut rewards = Self {
            scorers: Vec::new(),
        };
        for config in configs {
            let scorer: Box<dyn Scorer> = match &config.scorer {
                ScorerConfig::Judge { partial } => Box::new(JudgeScorer { partial: *partial }),
                ScorerConfig::GenEval { detector, colors } => neural::geneval(detector, colors)?,
                ScorerConfig::Hps { model } => neural::hps(model)?,
                ScorerConfig::ImageReward { model } => neural::image_reward(model)?,
                ScorerConfig::Http {
                    url,
                    field,
                    timeout,
                    retries,
                } => Box::new(HttpScorer::new(url, field, *timeout, *retries)),
            };
            rewards.add(config.clone(), scorer)?;
        }
        match rewards.scorers.iter().any(|(c, _)| c.weight != 0.0) {
            true => Ok(rewards),
            false => Err(TrainError::Config {
                origin: "rewards".into(),
                reason: "no scorer has a weight; there is nothing to optimise".into(),
            }),
        }
    }

    /// Adds a scorer of the caller's.
    ///
    /// # Errors
    /// When its name is taken or its weight is not finite.
    pub fn add(&mut self, config: RewardConfig, scorer: Box<dyn Scorer>) -> Result<(), TrainError> {
        let taken = self.scorers.iter().any(|(c, _)| c.name == config.name);
        if taken || !config.weight.is_finite() {
            return Err(TrainError::Config {
                origin: "rewards".into(),
                reason: format!(
                    "scorer `{}` with weight {}: expected finite weights and a name of its own",
                    config.name, config.weight
                ),
            });
        }
        self.scorers.push((config, scorer));
        Ok(())
    }

    /// Scores samples by every scorer.
    ///
    /// # Errors
    /// When a scorer fails, gives another number of scores, or one that is not finite.
    pub fn score(&self, samples: &[Sample<'_>]) -> Result<Scores, TrainError> {
        let mut scores = Scores {
            total: vec![0.0; samples.len()],
            parts: Vec::new(),
        };
        for (config, scorer) in &self.scorers {
            let wrong = |reason: String| TrainError::Reward {
                scorer: config.name.clone(),
                reason,
            };
            let part = scorer.score(samples).map_err(wrong)?;
            if part.len() != samples.len() || part.iter().any(|score| !score.is_finite()) {
                return Err(wrong(format!(
                    "gave {} scores for {} pictures; expected one finite number for each",
                    part.len(),
                    samples.len()
                )));
            }
            for (total, score) in scores.total.iter_mut().zip(&part) {
                *total += config.weight * score;
            }
            scores.parts.push((config.name.clone(), part));
        }
        Ok(scores)
    }
}

impl Scores {
    /// Puts the scores of some samples into their places among `count`.
    pub(crate) fn place(&mut self, count: usize, indices: &[usize], some: Self) {
        let put = |whole: &mut Vec<f64>, part: &[f64]| {
            whole.resize(count, 0.0);
            for (index, value) in indices.iter().zip(part) {
                whole[*index] = *value;
            }
        };
        put(&mut self.total, &some.total);
        for (name, part) in some.parts {
            match self.parts.iter_mut().find(|(n, _)| *n == name) {
                Some((_, whole)) => put(whole, &part),
                None => {
                    let mut whole = Vec::new();
                    put(&mut whole, &part);
                    self.parts.push((name, whole));
                }
            }
        }
    }
}

/// Mean and standard deviation (of the population).
pub(crate) fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(f64);

    impl Scorer for Constant {
        fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
            Ok(vec![self.0; samples.len()])
        }
    }

    fn config(name: &str, weight: f64) -> RewardConfig {
        RewardConfig {
            name: name.into(),
            weight,
            scorer: ScorerConfig::Judge { partial: 0.0 },
        }
    }

    #[test]
    fn the_reward_is_the_weighted_sum_and_parts_keep_their_names() {
        let mut rewards = Rewards {
            scorers: Vec::new(),
        };
        let add = |r: &mut Rewards, name, weight, value| {
            r.add(config(name, weight), Box::new(Constant(value)))
        };
        add(&mut rewards, "a", 2.0, 0.5).unwrap();
        add(&mut rewards, "b", -1.0, 3.0).unwrap();
        assert!(
            add(&mut rewards, "a", 1.0, 0.0).is_err(),
            "a name of its own"
        );
        let metadata = Metadata::parse(r#"{"tag": "t", "prompt": "p"}"#, "here").unwrap();
        let picture = RgbImage::new(1, 1);
        let sample = Sample {
            metadata: &metadata,
            picture: &picture,
        };
        let scores = rewards.score(&[sample; 2]).unwrap();
        assert_eq!(scores.total, [-2.0, -2.0]);
        assert_eq!(scores.parts[1], ("b".into(), vec![3.0, 3.0]));

        add(&mut rewards, "c", 0.0, f64::NAN).unwrap();
        let error = rewards.score(&[sample]).unwrap_err().to_string();
        assert!(error.contains("`c`") && error.contains("finite"), "{error}");
    }

    #[test]
    fn a_reward_without_weight_is_refused() {
        assert!(Rewards::open(&[config("a", 0.0)]).is_err());
        assert!(Rewards::open(&[config("a", 1.0)]).is_ok());
    }
}
