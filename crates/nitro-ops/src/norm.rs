//! Layer norm with AdaLN modulation, and RMS norm.

use burn::tensor::Tensor;

/// AdaLN's normalisation: `(layer_norm(x) * weight + bias) * (1 + scale) + shift`.
///
/// `x [batch, tokens, channels]`; `affine` is the norm's own `(weight, bias)`, each `[channels]`;
/// `modulation` is `(scale, shift)`, each `[batch, channels]`.
pub fn layer_norm_modulate(
    x: Tensor<3>,
    affine: Option<(&Tensor<1>, &Tensor<1>)>,
    modulation: Option<(Tensor<2>, Tensor<2>)>,
    eps: f64,
) -> Tensor<3> {
    let mean = x.clone().mean_dim(2);
    let centred = x - mean;
    let variance = centred.clone().powi_scalar(2).mean_dim(2);
    let mut y = centred / (variance + eps).sqrt();
    if let Some((weight, bias)) = affine {
        y = y * weight.clone().unsqueeze::<3>() + bias.clone().unsqueeze::<3>();
    }
    if let Some((scale, shift)) = modulation {
        y = y * (scale.unsqueeze_dim::<3>(1) + 1.0) + shift.unsqueeze_dim::<3>(1);
    }
    y
}

/// RMS norm over the last dimension: `x / sqrt(mean(x^2) + eps) * weight + bias`.
///
/// The last dimension of `x` is a multiple of `weight`'s length `d`; each run of `d` channels (an
/// attention head, say) is normalised by itself.
pub fn rms_norm<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<1>,
    bias: Option<&Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let dims = x.dims();
    let [width] = weight.dims();
    let rows = dims.iter().product::<usize>() / width;
    let x = x.reshape([rows, width]);
    let mean_square = x.clone().powi_scalar(2).mean_dim(1);
    let mut y = x / (mean_square + eps).sqrt() * weight.clone().unsqueeze::<2>();
    if let Some(bias) = bias {
        y = y + bias.clone().unsqueeze::<2>();
    }
    y.reshape(dims)
}
