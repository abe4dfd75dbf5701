//! Layer norm with AdaLN modulation, and RMS norm.

use burn::tensor::Tensor;
use nitro_kernels::norm::{self, LayerNormParamGrads, LayerNormParams, LayerNormShape};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::kernel;

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
    let (weight, bias) = affine.map_or((None, None), |(w, b)| (Some(w.clone()), Some(b.clone())));
    let (scale, shift) = modulation
        .clone()
        .map_or((None, None), |(a, b)| (Some(a), Some(b)));
    let inputs = (
        Handle::of(&x),
        Handle::optional(&weight),
        Handle::optional(&bias),
        Handle::optional(&scale),
        Handle::optional(&shift),
    );
    if let (Some(x), Some(weight), Some(bias), Some(scale), Some(shift)) = inputs {
        let op = LayerNormModulate { eps: eps as f32 };
        return apply(op, [x, weight, bias, scale, shift]).into_tensor();
    }
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
    let inputs = (
        Handle::of(&x),
        Handle::of(weight),
        Handle::optional(&bias.cloned()),
    );
    if let (Some(x), Some(weight), Some(bias)) = inputs {
        return apply(RmsNorm { eps: eps as f32 }, [x, weight, bias]).into_tensor();
    }
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

#[derive(Clone, Copy, Debug)]
struct LayerNormModulate {
    eps: f32,
}

impl LayerNormModulate {
    fn shape(x: &Array) -> LayerNormShape {
        let dims = x.dims();
        LayerNormShape {
            batch: dims[0],
            tokens: dims[1],
            channels: dims[2],
        }
    }

    fn params<'a>([_, weight, bias, scale, shift]: &'a [Array; 5]) -> LayerNormParams<'a> {
        LayerNormParams {
            weight: weight.optional(),
            bias: bias.optional(),
            scale: scale.optional(),
            shift: shift.optional(),
        }
    }
}

impl FusedOp<5> for LayerNormModulate {
    /// Mean and reciprocal deviation of each row.
    type Saved = (Array, Array);

    fn forward(&self, inputs: &[Array; 5], _: bool) -> (Array, Self::Saved) {
        let x = &inputs[0];
        let shape = Self::shape(x);
        let rows = shape.batch * shape.tokens;
        let (mut y, mut mean, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; rows]);
        kernel(norm::layer_norm_modulate_forward(
            shape,
            x.data(),
            Self::params(inputs),
            self.eps,
            &mut y,
            &mut mean,
            &mut rstd,
        ));
        (
            Array::new(y, &x.dims()),
            (Array::new(mean, &[rows]), Array::new(rstd, &[rows])),
        )
    }

    fn backward(
        &self,
        inputs: &[Array; 5],
        (mean, rstd): &Self::Saved,
        grad: &Array,
        needed: [bool; 5],
    ) -> [Option<Array>; 5] {
        let x = &inputs[0];
        let mut dx = vec![0.0; x.len()];
        let mut sums: [Option<Vec<f32>>; 4] = std::array::from_fn(|i| {
            let wanted = needed[i + 1] && inputs[i + 1].len() > 0;
            wanted.then(|| vec![0.0; inputs[i + 1].len()])
        });
        let [weight, bias, scale, shift] = &mut sums;
        let grads = LayerNormParamGrads {
            weight: weight.as_deref_mut(),
            bias: bias.as_deref_mut(),
            scale: scale.as_deref_mut(),
            shift: shift.as_deref_mut(),
        };
        kernel(norm::layer_norm_modulate_backward(
            Self::shape(x),
            grad.data(),
            x.data(),
            Self::params(inputs),
            mean.data(),
            rstd.data(),
            &mut dx,
            grads,
        ));
        let [weight, bias, scale, shift] = sums;
        let array =
            |sum: Option<Vec<f32>>, input: &Array| sum.map(|v| Array::new(v, &input.dims()));
        [
            Some(Array::new(dx, &x.dims())),
            array(weight, &inputs[1]),
            array(bias, &inputs[2]),
            array(scale, &inputs[3]),
            array(shift, &inputs[4]),
        ]
    }
}

#[derive(Clone, Copy, Debug)]
struct RmsNorm {
    eps: f32,
}

impl FusedOp<3> for RmsNorm {
    /// Reciprocal root mean square of each row.
    type Saved = Array;

    fn forward(&self, [x, weight, bias]: &[Array; 3], _: bool) -> (Array, Self::Saved) {
        let width = weight.len();
        let rows = x.len() / width.max(1);
        let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows]);
        kernel(norm::rms_norm_forward(
            width,
            x.data(),
            weight.optional(),
            bias.optional(),
            self.eps,
            &mut y,
            &mut rstd,
        ));
        (Array::new(y, &x.dims()), Array::new(rstd, &[rows]))
    }

    fn backward(
        &self,
        [x, weight, bias]: &[Array; 3],
        rstd: &Self::Saved,
        grad: &Array,
        needed: [bool; 3],
    ) -> [Option<Array>; 3] {
        let width = weight.len();
        let mut dx = vec![0.0; x.len()];
        let mut dweight = needed[1].then(|| vec![0.0; width]);
        let mut dbias = (needed[2] && bias.len() > 0).then(|| vec![0.0; width]);
        kernel(norm::rms_norm_backward(
            width,
            grad.data(),
            x.data(),
            weight.optional(),
            rstd.data(),
            &mut dx,
            dweight.as_deref_mut(),
            dbias.as_deref_mut(),
        ));
        [
            Some(Array::new(dx, &x.dims())),
            dweight.map(|v| Array::new(v, &[width])),
            dbias.map(|v| Array::new(v, &[width])),
        ]
    }
}
