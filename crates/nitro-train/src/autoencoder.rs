//! Training a DC-AE on pictures of the shapes world.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_data::shapes::{Example, render};
use nitro_diffusion::noise::CpuGenerator;
use nitro_models::dcae::{Dcae, DcaeConfig};
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use rayon::prelude::*;

use crate::TrainError;
use crate::config::{AutoencoderTask, CommonConfig};
use crate::data::{HELD_OUT, example_seed, noise_generator};
use crate::pictures::{from_bytes, sample_path, write_grid};
use crate::trainer::{Losses, Task};

/// A DC-AE, its pictures and its loss.
pub struct Autoencoder<'a> {
    common: &'a CommonConfig,
    task: &'a AutoencoderTask,
}

/// Pictures of one step, `[count, 3, side, side]` in `-1..=1`, and a generator of each one's noise.
pub struct Pictures {
    pixels: Vec<f32>,
    side: usize,
    noise: Vec<CpuGenerator>,
}

impl<'a> Autoencoder<'a> {
    /// The task that `task` describes.
    pub fn new(common: &'a CommonConfig, task: &'a AutoencoderTask) -> Self {
        Self { common, task }
    }

    /// One over the standard deviation of the latents of held-out pictures.
    pub fn scaling_factor(&self, averaged: &TensorMap) -> Result<f64, TrainError> {
        let params = Params::new(averaged, &Device::flex(), Precision::F32);
        let model = Dcae::new(&self.task.model, &params)?;
        let pixels = held_out(64, self.task.image_size);
        let side = self.task.image_size;
        let latent = model.encode(tensor(pixels, 64, side, &Device::flex()))?;
        let square = latent.powi_scalar(2).mean().into_scalar::<f32>();
        Ok(1.0 / f64::from(square).sqrt())
    }
}

impl Task for Autoencoder<'_> {
    type Batch = Pictures;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Dcae::new(&self.task.model, p)?;
        Ok(())
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Pictures, TrainError> {
        let whole = self.task.image_size;
        let cropped = step + self.task.full_size_steps < self.common.max_steps;
        let side = if cropped {
            self.task.crop_size.min(whole)
        } else {
            whole
        };
        let seed = self.common.seed;
        let seeds: Vec<u64> = examples
            .clone()
            .map(|i| example_seed(seed, step, i))
            .collect();
        let pixels = seeds
            .par_iter()
            .flat_map_iter(|seed| {
                let picture = render(&Example::from_seed(*seed).scene, whole);
                let range = (whole - side + 1) as u64;
                let (x, y) = ((seed >> 8) % range, (seed >> 32) % range);
                from_bytes(&picture, whole, (x as usize, y as usize), side)
            })
            .collect();
        Ok(Pictures {
            pixels,
            side,
            noise: examples.map(|i| noise_generator(seed, step, i)).collect(),
        })
    }

    fn loss(&self, p: &Params<'_>, batch: Pictures) -> Result<Losses, TrainError> {
        let model = Dcae::new(&self.task.model, p)?;
        let device = Device::flex();
        let count = batch.noise.len();
        let x = tensor(batch.pixels, count, batch.side, &device);
        let latent = model.encode(x.clone())?;
        let penalty = latent.clone().powi_scalar(2).mean();
        let dims = latent.dims();
        let each = dims[1..].iter().product();
        let noise: Vec<f32> = batch
            .noise
            .into_iter()
            .flat_map(|mut generator| generator.randn(each))
            .collect();
        let noise = Tensor::<4>::from_data(TensorData::new(noise, dims), &device);
        let y = model.decode(latent + noise * self.task.latent_noise)?;
        let difference = y - x;
        let absolute = difference.clone().abs().mean();
        let square = difference.powi_scalar(2).mean();
        let mse = f64::from(square.clone().into_scalar::<f32>());
        let total = absolute + square * 2.0 + penalty.clone() * self.task.latent_penalty;
        let size = f64::from(penalty.into_scalar::<f32>());
        // Pixels span two units, so the peak of the signal-to-noise ratio is four.
        Ok(Losses {
            total,
            parts: vec![
                ("psnr", 10.0 * (4.0 / mse).log10()),
                ("latent_mean_square", size),
            ],
        })
    }

    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError> {
        let params = Params::new(averaged, &Device::flex(), Precision::F32);
        let model = Dcae::new(&self.task.model, &params)?;
        let side = self.task.image_size;
        let x = tensor(held_out(8, side), 8, side, &Device::flex());
        let y = model.decode(model.encode(x.clone())?)?;
        let path = sample_path(dir, step);
        write_grid(&path, Tensor::cat(vec![x, y], 0), 8)?;
        Ok(Some(path))
    }
}

/// The configuration to ship with trained weights.
pub fn shipped_config(model: &DcaeConfig, scaling_factor: f64) -> DcaeConfig {
    DcaeConfig {
        scaling_factor,
        ..model.clone()
    }
}

fn held_out(count: u64, side: usize) -> Vec<f32> {
    (0..count)
        .flat_map(|i| {
            let picture = render(&Example::from_seed(HELD_OUT + i).scene, side);
            from_bytes(&picture, side, (0, 0), side)
        })
        .collect()
}

fn tensor(pixels: Vec<f32>, count: usize, side: usize, device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(pixels, [count, 3, side, side]), device)
}
