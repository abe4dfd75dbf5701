//! Scorers with weights of their own: HPSv2.1, ImageReward, and GenEval with its detector.

use std::sync::Mutex;

use burn::tensor::Device;
use image::RgbImage;
use nitro_eval::EvalError;
use nitro_eval::geneval::{Judge, Options};
use nitro_eval::scorers::{Hps, ImageRewardScorer, ScorerFiles};
use nitro_ops::Precision;
use nitro_pipeline::HubOptions;

use super::{Sample, Scorer};

/// Pictures that go through a scorer together.
const BATCH: usize = 16;

/// HPSv2.1 of a file, a folder or a Hub repository; about 0.2 to 0.3 for pictures people like.
pub(super) fn hps(model: &str) -> Result<Box<dyn Scorer>, EvalError> {
    Ok(Box::new(Preference(
        files(model).hps(&device(), PRECISION)?.scorer,
    )))
}

/// ImageReward, likewise; about -2 to 2.
pub(super) fn image_reward(model: &str) -> Result<Box<dyn Scorer>, EvalError> {
    let files = files(model);
    Ok(Box::new(Reward(
        files.image_reward(&device(), PRECISION)?.scorer,
    )))
}

/// GenEval's rules over Mask2Former and CLIP: 1 or 0.
pub(super) fn geneval(detector: &str, colors: &str) -> Result<Box<dyn Scorer>, EvalError> {
    let detector = files(detector).detector(&device(), PRECISION)?.scorer;
    let colors = files(colors).colors(&device(), PRECISION)?.scorer;
    Ok(Box::new(GenEval(Mutex::new(Judge::new(detector, colors)))))
}

const PRECISION: Precision = Precision::Bf16;

fn device() -> Device {
    Device::flex()
}

fn files(model: &str) -> ScorerFiles {
    ScorerFiles::new(model, HubOptions::from_env())
}

struct Preference(Hps);

impl Scorer for Preference {
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
        in_batches(samples, |pairs| self.0.score(pairs))
    }
}

struct Reward(ImageRewardScorer);

impl Scorer for Reward {
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
        in_batches(samples, |pairs| self.0.score(pairs))
    }
}

fn in_batches(
    samples: &[Sample<'_>],
    score: impl Fn(&[(&RgbImage, &str)]) -> Result<Vec<f32>, EvalError>,
) -> Result<Vec<f64>, String> {
    let mut scores = Vec::with_capacity(samples.len());
    for batch in samples.chunks(BATCH) {
        let pairs: Vec<(&RgbImage, &str)> = batch
            .iter()
            .map(|sample| (sample.picture, sample.metadata.prompt.as_str()))
            .collect();
        let batch = score(&pairs).map_err(|error| error.to_string())?;
        scores.extend(batch.into_iter().map(f64::from));
    }
    Ok(scores)
}

struct GenEval(Mutex<Judge>);

impl Scorer for GenEval {
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
        let mut judge = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        samples
            .iter()
            .map(|sample| {
                let options = [Options::default()];
                let records = judge
                    .judge("sample", sample.picture, sample.metadata, &options)
                    .map_err(|error| error.to_string())?;
                let correct = records.first().is_some_and(|record| record.correct);
                Ok(f64::from(u8::from(correct)))
            })
            .collect()
    }
}
