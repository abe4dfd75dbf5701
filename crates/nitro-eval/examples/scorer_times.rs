//! Seconds per picture of the scorers at their real sizes, with made-up weights:
//! `cargo run --release -p nitro-eval --example scorer_times -- [hps|image-reward|detector|clip] [f32|bf16]`.

use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use image::{Rgb, RgbImage};
use nitro_eval::EvalError;
use nitro_eval::scorers::{ColorClassifier, Detector, Hps, ImageRewardScorer};
use nitro_models::blip::{ImageRewardConfig, MedConfig, VitConfig};
use nitro_models::clip::ClipConfig;
use nitro_models::mask2former::Mask2FormerConfig;
use nitro_models::{ParameterSource, ParameterSpec, Params, WeightError};
use nitro_ops::Precision;

/// Small values of both signs; what they are does not matter for time.
struct Ramp;

impl ParameterSource for Ramp {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let count = spec.numel();
        let values: Vec<f32> = (0..count)
            .map(|i| ((i % 17) as f32 - 8.0) * 0.005)
            .collect();
        Ok(Tensor::from_data(TensorData::new(values, [count]), device))
    }

    fn contains(&self, _: &str) -> bool {
        false
    }
}

/// Times the second call of `score`, and says how long `score` takes for one picture.
fn time(
    name: &str,
    mut score: impl FnMut(&RgbImage) -> Result<(), EvalError>,
) -> Result<(), EvalError> {
    let picture = RgbImage::from_fn(512, 512, |x, y| Rgb([x as u8, y as u8, (x ^ y) as u8]));
    score(&picture)?;
    let begun = Instant::now();
    score(&picture)?;
    println!(
        "{name}: {:.2} s per picture of 512 pixels",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

fn main() -> Result<(), EvalError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| arguments.iter().any(|a| a == name);
    let precision = if asked("bf16") {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let device = Device::flex();
    let p = Params::new(&Ramp, &device, precision);
    let all = !["hps", "image-reward", "detector", "clip"]
        .into_iter()
        .any(asked);
    if all || asked("hps") {
        let hps = Hps::new(&ClipConfig::vit_h_14(), &p)?;
        time("hps", |i| {
            hps.score(&[(i, "a photo of a red car")]).map(drop)
        })?;
    }
    if all || asked("image-reward") {
        let med = MedConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            layer_norm_eps: 1e-12,
            max_position_embeddings: 512,
            num_attention_heads: 12,
            num_hidden_layers: 12,
            vocab_size: 30524,
        };
        let config = ImageRewardConfig::new(med, VitConfig::default());
        let reward = ImageRewardScorer::new(&config, &p)?;
        time("image-reward", |i| {
            reward.score(&[(i, "a red car")]).map(drop)
        })?;
    }
    if all || asked("detector") {
        let detector = Detector::new(&Mask2FormerConfig::default(), &p)?;
        time("detector", |i| detector.detect(i).map(drop))?;
    }
    if all || asked("clip") {
        let mut clip = ColorClassifier::new(&ClipConfig::vit_l_14_openai(), &p)?;
        time("clip", |i| {
            clip.classify(std::slice::from_ref(i), "car").map(drop)
        })?;
    }
    Ok(())
}
