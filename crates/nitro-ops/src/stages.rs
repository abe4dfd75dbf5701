//! Stages and blocks of an autoencoder over weights that were packed once, on the CPU and without
//! gradients.

use burn::tensor::Tensor;

use crate::fused::Array;
use crate::linear::kernel;
use crate::packed::host_array;
use crate::profile;

pub use nitro_kernels::conv::{
    Conv2d, Entry, Head, Norm, PackedConv2d, ResidualBlock, Stage, Stages, WinogradConv,
    WinogradForm,
};
pub use nitro_kernels::efficientvit::{EfficientVit, EfficientVitWeights, MixedScale};
pub use nitro_kernels::error::KernelError;

/// Runs `stages` over `x [batch, height, width, inputs]`; see [`Stages::run`] for `rows`.
///
/// # Panics
/// If `x` is not an `f32` tensor on the CPU, or its channels are not those of the first stage.
pub fn run_stages(x: Tensor<4>, stages: &Stages, rows: Option<usize>) -> Tensor<4> {
    let [batch, height, width, _] = x.dims();
    let [out_height, out_width] = stages.output_size([height, width]);
    let dims = [batch, out_height, out_width, stages.outputs()];
    let _scope = profile::scope(|| {
        let flop = batch as f64 * stages.flop([height, width]);
        (format!("Stages {:?} -> {dims:?}", x.dims()), flop)
    });
    let mut y = vec![0.0; dims.iter().product()];
    let x = host_array(&x);
    let (image, result) = (x.len() / batch.max(1), y.len() / batch.max(1));
    for i in 0..batch {
        let x = &x.data()[i * image..][..image];
        let y = &mut y[i * result..][..result];
        kernel(stages.run([height, width], x, rows, y));
    }
    Array::new(y, &dims).into_tensor()
}

/// Applies `block` to the images `x [batch, height, width, channels]`.
///
/// # Panics
/// As [`run_stages`].
pub fn run_efficient_vit(x: Tensor<4>, block: &EfficientVit) -> Tensor<4> {
    let dims = x.dims();
    let _scope = profile::scope(|| {
        let flop = dims[0] as f64 * block.flop([dims[1], dims[2]]);
        (format!("EfficientVit {dims:?}"), flop)
    });
    let mut y = host_array(&x).data().to_vec();
    let image = y.len() / dims[0].max(1);
    for y in y.chunks_exact_mut(image.max(1)) {
        kernel(block.run([dims[1], dims[2]], y));
    }
    Array::new(y, &dims).into_tensor()
}
