//! Training the miniature's preference model: a small CLIP, of the architecture that HPSv2.1 is made
//! of, on pictures of the shapes world with their captions.
//!
//! HPSv2.1 is a CLIP fine-tuned on which of two pictures people prefer for a text. Nobody has compared
//! pictures of shapes, so this one learns CLIP's own task (arXiv 2103.00020): of the captions of a
//! batch, which belongs to this picture, and the other way round. Its score, the cosine of picture and
//! caption, falls when a picture shows something else or looks like nothing that was rendered.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use image::RgbImage;
use nitro_data::shapes::{Example, render};
use nitro_eval::pixels::hps_pixels;
use nitro_eval::tokens::ClipTokenizer;
use nitro_models::clip::{Clip, ClipConfig, normalize};
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::TrainError;
use crate::config::CommonConfig;
use crate::data::{HELD_OUT, example_seed};
use crate::files::write_json;
use crate::losses::{accuracy, cross_entropy};
use crate::trainer::{Losses, Task};

/// CLIP's bound on the factor of the similarities.
const MAX_SCALE: f64 = 100.0;
/// Held-out pairs by which progress is told.
const CHECKED: usize = 64;

/// Training of the preference model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceTask {
    /// The architecture; pictures are rendered at its size.
    pub model: ClipConfig,
}

/// A CLIP and its pairs.
pub struct Preference<'a> {
    common: &'a CommonConfig,
    task: &'a PreferenceTask,
    tokenizer: ClipTokenizer,
}

/// Pictures and captions, one of each per pair.
pub struct Pairs {
    pixels: Tensor<4>,   // [B, 3, side, side]
    ids: Tensor<2, Int>, // [B, context]
}

impl<'a> Preference<'a> {
    /// The task that `task` describes.
    pub fn new(common: &'a CommonConfig, task: &'a PreferenceTask) -> Self {
        Self {
            common,
            task,
            tokenizer: ClipTokenizer::new(),
        }
    }

    /// The pairs `wanted` of those with different captions; two pictures of one caption would
    /// contradict the loss.
    fn pairs(&self, seeds: impl Iterator<Item = u64>, wanted: Range<usize>) -> Pairs {
        let mut known = HashSet::new();
        let examples: Vec<Example> = seeds
            .map(Example::from_seed)
            .filter(|example| known.insert(example.caption.clone()))
            .skip(wanted.start)
            .take(wanted.len())
            .collect();
        let side = self.task.model.vision_cfg.image_size;
        let pixels: Vec<f32> = examples
            .par_iter()
            .flat_map_iter(|example| {
                let bytes = render(&example.scene, side);
                RgbImage::from_raw(side as u32, side as u32, bytes)
                    .map(|picture| hps_pixels(&picture, side).values)
                    .unwrap_or_default()
            })
            .collect();
        let context = self.task.model.text_cfg.context_length;
        let ids: Vec<i32> = examples
            .iter()
            .flat_map(|example| self.tokenizer.encode(&example.caption, context))
            .map(|id| id as i32)
            .collect();
        let device = Device::flex();
        let count = examples.len();
        Pairs {
            pixels: Tensor::from_data(TensorData::new(pixels, [count, 3, side, side]), &device),
            ids: Tensor::from_data(TensorData::new(ids, [count, context]), &device),
        }
    }

    /// Similarities of all pictures (rows) with all captions, times the learnt factor.
    fn logits(&self, p: &Params<'_>, pairs: Pairs) -> Result<Tensor<2>, TrainError> {
        let model = Clip::new(&self.task.model, p)?;
        let images = normalize(model.encode_image(pairs.pixels)?);
        let texts = normalize(model.encode_text(pairs.ids)?);
        let scale = model.logit_scale().clamp_max(MAX_SCALE).reshape([1, 1]);
        Ok(images.matmul(texts.transpose()) * scale)
    }
}

/// The numbers of the matching pairs.
fn diagonal(count: usize) -> Tensor<1, Int> {
    let numbers: Vec<i32> = (0..count as i32).collect();
    Tensor::from_data(TensorData::new(numbers, [count]), &Device::flex())
}

impl Task for Preference<'_> {
    type Batch = Pairs;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Ok(Clip::new(&self.task.model, p).map(drop)?)
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Pairs, TrainError> {
        let seeds = (0..).map(|i| example_seed(self.common.seed, step, i));
        Ok(self.pairs(seeds, examples))
    }

    fn loss(&self, p: &Params<'_>, batch: Pairs) -> Result<Losses, TrainError> {
        let logits = self.logits(p, batch)?;
        let [count, _] = logits.dims();
        let by_picture = cross_entropy(logits.clone(), diagonal(count), None);
        let by_caption = cross_entropy(logits.clone().transpose(), diagonal(count), None);
        Ok(Losses {
            total: (by_picture + by_caption) * 0.5,
            parts: vec![("right", accuracy(logits, diagonal(count)))],
        })
    }

    /// Of 64 held-out pairs, the share of pictures whose own caption is the nearest.
    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError> {
        let precision = Precision::from(self.common.precision);
        let p = Params::new(averaged, &Device::flex(), precision);
        let pairs = self.pairs((0..).map(|i| HELD_OUT + i), 0..CHECKED);
        let logits = self.logits(&p, pairs)?;
        let right = accuracy(logits, diagonal(CHECKED));
        let path = dir.join(format!("step-{step:08}.json"));
        write_json(&path, &json!({ "pairs": CHECKED, "right": right }))?;
        Ok(None)
    }
}
