//! REPA's targets: patch features of a frozen DINOv2 for the pictures of a training step.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::dinov2::{Dinov2, Dinov2Config};
use nitro_models::{Params, WeightFiles};
use nitro_ops::Precision;

use crate::TrainError;

/// A frozen encoder.
pub(crate) struct Teacher {
    encoder: Dinov2,
    /// Side of the pictures it looks at.
    pub(crate) side: usize,
}

impl Teacher {
    /// The encoder at `path` for a model of `grid` x `grid` tokens and one projector of `width`.
    pub(crate) fn open(
        path: &Path,
        grid: usize,
        width: usize,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        let (config, files): (_, WeightFiles) = Dinov2Config::open(path)?;
        if width != config.embed_dim {
            return Err(TrainError::Config {
                origin: "task.model.repa.z_dims".into(),
                reason: format!(
                    "the encoder in {} gives features of width {}: expected z_dims: [{}]",
                    path.display(),
                    config.embed_dim,
                    config.embed_dim
                ),
            });
        }
        let params = Params::new(&files, &Device::flex(), precision).for_inference();
        let mut encoder = Dinov2::new(&config, &params)?;
        if config.grid() != grid {
            encoder = encoder.resampled([grid; 2]);
        }
        Ok(Self {
            encoder,
            side: grid * config.patch_size,
        })
    }

    /// The features of pictures `[count, 3, side, side]` normalised for the encoder, `[count, T, z]`:
    /// one per token of the model.
    pub(crate) fn features(&self, pictures: Vec<f32>) -> Result<Tensor<3>, TrainError> {
        let side = self.side;
        let count = pictures.len() / (3 * side * side);
        let pictures = TensorData::new(pictures, [count, 3, side, side]);
        let pictures = Tensor::from_data(pictures, &Device::flex());
        Ok(self.encoder.forward_features(pictures)?.patches)
    }
}
