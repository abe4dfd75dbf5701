//! Neural scorers with their official weights: HPSv2.1, ImageReward, and GenEval's detector and
//! colour classifier.

mod colors;
mod detector;
mod files;
mod hps;
mod image_reward;
mod instances;

pub use colors::{Background, ColorClassifier, color_classifier, color_logits, object_crop};
pub use detector::{Detector, detector_pixels};
pub use files::{Loaded, ScorerFiles, official};
pub use hps::Hps;
pub use image_reward::{IMAGE_REWARD_TOKENS, ImageRewardScorer};
pub use instances::{Canvas, Instance, instances};

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use nitro_models::InputError;

use crate::EvalError;
use crate::pixels::Planes;

/// Pictures of one size as a tensor `[n, 3, height, width]`.
fn image_batch(images: &[Planes], device: &Device) -> Tensor<4> {
    let (h, w) = images.first().map_or((0, 0), |i| (i.height, i.width));
    let values: Vec<f32> = images
        .iter()
        .flat_map(|i| i.values.iter().copied())
        .collect();
    Tensor::from_data(TensorData::new(values, [images.len(), 3, h, w]), device)
}

/// Token ids of one length as a tensor `[n, tokens]`.
fn id_batch(texts: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let tokens = texts.first().map_or(0, Vec::len);
    let ids: Vec<i32> = texts.iter().flatten().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(ids, [texts.len(), tokens]), device)
}

/// For each text, which of `tokens` ids are not padding.
fn mask_batch(used: &[usize], tokens: usize, device: &Device) -> Tensor<2, Bool> {
    let mask: Vec<bool> = (used.iter())
        .flat_map(|used| (0..tokens).map(move |i| i < *used))
        .collect();
    Tensor::from_data(TensorData::new(mask, [used.len(), tokens]), device)
}

/// A tensor's elements in row-major order.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn refused(source: InputError) -> EvalError {
    EvalError::Scorer {
        reason: source.to_string(),
    }
}
