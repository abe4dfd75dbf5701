//! REPA's targets: patch features of a frozen DINOv2 for the pictures of a training step.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_data::shapes::{Example, render};
use nitro_models::dinov2::{Dinov2, Dinov2Config};
use nitro_models::{Params, WeightFiles};
use nitro_ops::Precision;
use rayon::prelude::*;

use crate::TrainError;
use crate::config::{EmmditTask, RepaTask};
use crate::latents::{Latents, read_config};
use crate::pictures::{from_bytes, normalised};

/// A frozen encoder, and what its features weigh in the loss.
pub(crate) struct Teacher {
    encoder: Dinov2,
    side: usize,
    /// Weight of the alignment in the loss.
    pub(crate) weight: f64,
}

impl Teacher {
    /// The encoder that `repa` names, for the token grid and projector of `task`.
    pub(crate) fn new(
        task: &EmmditTask,
        repa: &RepaTask,
        latents: &Latents,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        let dir = &repa.encoder;
        let config: Dinov2Config = read_config(&dir.join("config.json"))?;
        let widths = task.model.repa.as_ref().map(|repa| repa.z_dims.clone());
        if widths != Some(vec![config.embed_dim]) {
            return Err(TrainError::Config {
                origin: "task.model.repa.z_dims".into(),
                reason: format!(
                    "the encoder in {} gives features of width {}: expected z_dims: [{}]",
                    dir.display(),
                    config.embed_dim,
                    config.embed_dim
                ),
            });
        }
        latents.check_seeds()?;
        let files = WeightFiles::open(dir.join("model.safetensors"))?;
        let params = Params::new(&files, &Device::flex(), precision).for_inference();
        let mut encoder = Dinov2::new(&config, &params)?;
        let grid = task.model.sample_size / task.model.patch_size;
        if config.grid() != grid {
            encoder = encoder.resampled([grid; 2]);
        }
        Ok(Self {
            encoder,
            side: grid * config.patch_size,
            weight: repa.weight,
        })
    }

    /// The pictures of these pairs, `[pairs, 3, side, side]`, as the encoder takes them.
    pub(crate) fn pictures(&self, latents: &Latents, pairs: &[usize]) -> Vec<f32> {
        let side = self.side;
        pairs
            .par_iter()
            .flat_map_iter(|index| {
                let scene = Example::from_seed(latents.seed(*index)).scene;
                normalised(from_bytes(&render(&scene, side), side, (0, 0), side))
            })
            .collect()
    }

    /// The features of [`pictures`](Self::pictures), `[pairs, T, z]`: one per token of the model.
    pub(crate) fn features(&self, pictures: Vec<f32>) -> Result<Tensor<3>, TrainError> {
        let side = self.side;
        let count = pictures.len() / (3 * side * side);
        let pictures = TensorData::new(pictures, [count, 3, side, side]);
        let pictures = Tensor::from_data(pictures, &Device::flex());
        Ok(self.encoder.forward_features(pictures)?.patches)
    }
}
