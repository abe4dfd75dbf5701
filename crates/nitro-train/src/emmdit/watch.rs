//! What one watches of a training: sample pictures and the score on the shapes bench.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use image::RgbImage;
use nitro_diffusion::guidance;
use nitro_diffusion::noise::NoiseKind;
use nitro_diffusion::sampler::Euler;
use nitro_eval::shapes::shapes_bench;
use nitro_models::emmdit::Emmdit;
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use serde::{Deserialize, Serialize};

use super::EmmditTraining;
use crate::TrainError;
use crate::pictures::{sample_path, to_bytes, write_grid};
use crate::rewards::{Sample, credit, is_right};

/// Pictures made at once for a score.
const TOGETHER: usize = 20;
/// Sampling steps of the samples, and of the model when nothing else is asked for.
pub(crate) const STEPS: usize = 20;
/// Guidance scale, likewise.
pub(crate) const GUIDANCE: f32 = 4.5;

/// What the judge says of pictures of the shapes bench, means from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct BenchScores {
    /// The share that is right: the bench's own score.
    pub(crate) right: f64,
    /// Partly right pictures counted in part, as a reward counts them: tells weak models apart.
    pub(crate) credit: f64,
}

impl BenchScores {
    fn add(&mut self, sample: &Sample<'_>) -> Result<(), String> {
        let right = is_right(sample)?;
        self.right += f64::from(u8::from(right));
        self.credit += if right { 1.0 } else { credit(sample)? };
        Ok(())
    }
}

impl EmmditTraining<'_> {
    /// Pictures `[prompts, 3, side, side]` that the averaged weights make, one per prompt and seed.
    fn pictures(
        &self,
        averaged: &TensorMap,
        prompts: &[&str],
        seeds: &[u64],
    ) -> Result<Tensor<4>, TrainError> {
        let device = Device::flex();
        let precision = Precision::from(self.common.precision);
        let params = Params::new(averaged, &device, precision).for_inference();
        let config = &self.task.model;
        let model = Emmdit::new(config, &params)?;
        let [c, h, w] = [config.in_channels, config.sample_size, config.sample_size];
        let count = prompts.len();
        let empty = self.text_states(&[""])?.repeat_dim(0, count);
        let text = Tensor::cat(vec![empty, self.text_states(prompts)?], 0);
        let noise = NoiseKind::TorchCpu.per_sample(seeds, c * h * w);
        let timetable = self.schedule.timetable(STEPS)?;
        let latents = Euler::new(&timetable).run(
            noise,
            count,
            guidance::classifier_free(GUIDANCE, |both: &[f32], timestep| {
                let both = TensorData::new(both.to_vec(), [2 * count, c, h, w]);
                let times = vec![timestep; 2 * count];
                let v = model.forward(Tensor::from_data(both, &device), text.clone(), &times)?;
                Ok::<_, TrainError>(v.into_data().try_into_vec::<f32>().unwrap_or_default())
            }),
            |_| std::ops::ControlFlow::Continue(()),
        );
        let latents = latents.map_err(|error| TrainError::Config {
            origin: "sampling".into(),
            reason: error.to_string(),
        })?;
        Ok(self.frozen()?.decode_latents(&latents, count)?)
    }

    /// Writes a picture for each sample prompt, prompt `i` with seed `i`, as one PNG.
    pub(super) fn sample_grid(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<PathBuf, TrainError> {
        let own = match self.task.sample_prompts.is_empty() {
            true => self.source.sample_prompts()?,
            false => self.task.sample_prompts.clone(),
        };
        let prompts: Vec<&str> = own.iter().map(String::as_str).collect();
        let seeds: Vec<u64> = (0..prompts.len() as u64).collect();
        let path = sample_path(dir, step);
        let pictures = self.pictures(averaged, &prompts, &seeds)?;
        write_grid(&path, pictures, prompts.len().min(8))?;
        Ok(path)
    }

    /// How right pictures of `count` prompts of the shapes bench are, at least one, spread over its tasks.
    pub(crate) fn bench_scores(
        &self,
        averaged: &TensorMap,
        count: usize,
    ) -> Result<BenchScores, TrainError> {
        let bench = shapes_bench();
        let count = count.clamp(1, bench.len());
        let chosen: Vec<_> = (0..count)
            .map(|i| &bench[i * bench.len() / count])
            .collect();
        let mut scores = BenchScores::default();
        for group in chosen.chunks(TOGETHER) {
            let prompts: Vec<&str> = group.iter().map(|prompt| prompt.prompt()).collect();
            // Seed 0 for each, as the bench's first picture of a prompt has.
            let pictures = self.pictures(averaged, &prompts, &vec![0; group.len()])?;
            let [_, _, height, width] = pictures.dims().map(|n| n as u32);
            for (prompt, rgb) in group.iter().zip(to_bytes(pictures)) {
                let picture = RgbImage::from_raw(width, height, rgb).unwrap_or_default();
                let sample = Sample {
                    metadata: &prompt.metadata,
                    picture: &picture,
                };
                scores.add(&sample).map_err(|reason| TrainError::Config {
                    origin: "the score".into(),
                    reason,
                })?;
            }
        }
        scores.right /= count as f64;
        scores.credit /= count as f64;
        Ok(scores)
    }
}
