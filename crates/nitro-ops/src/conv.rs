//! 2-D convolution over channel-last images.

use burn::tensor::Tensor;
use burn::tensor::module::conv2d as burn_conv2d;
use burn::tensor::ops::ConvOptions;

use crate::{Activation, Precision};

/// Stride, padding and groups of a convolution; the kernel's size is its weight's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Step in both directions.
    pub stride: usize,
    /// Zeros on every side.
    pub padding: usize,
    /// Channel groups.
    pub groups: usize,
}

/// Convolution of `x [batch, height, width, in]` with `weight [out, in / groups, kh, kw]` and
/// `bias [out]`, the official `torch.nn.Conv2d` shapes; gives `[batch, height', width', out]`.
pub fn conv2d(
    x: Tensor<4>,
    weight: &Tensor<4>,
    bias: Option<&Tensor<1>>,
    geometry: ConvGeometry,
    activation: Activation,
    _precision: Precision,
) -> Tensor<4> {
    let ConvGeometry { stride, padding, groups } = geometry;
    let options = ConvOptions::new([stride; 2], [padding; 2], [1, 1], groups);
    let x = x.permute([0, 3, 1, 2]);
    let y = burn_conv2d(x, weight.clone(), bias.cloned(), options);
    activation.apply(y.permute([0, 2, 3, 1]))
}
