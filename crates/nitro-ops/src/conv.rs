//! 2-D convolution over channel-last images.

use burn::tensor::Tensor;
use burn::tensor::module::conv2d as burn_conv2d;
use burn::tensor::ops::ConvOptions;

use nitro_kernels::conv::{
    Conv2d, PackedConv2d, conv2d_backward_input, conv2d_backward_weight, conv2d_forward,
};
use nitro_kernels::gemm::{Epilogue, MatRef, column_sum};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::{activate, activation_backward, kernel};
use crate::packed::host_array;
use crate::{Activation, Precision, profile};

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
    precision: Precision,
) -> Tensor<4> {
    let inputs = (
        Handle::of(&x),
        Handle::of(weight),
        Handle::optional(&bias.cloned()),
    );
    if let (Some(x), Some(weight), Some(bias)) = inputs {
        let op = ConvOp {
            geometry,
            activation,
            precision,
        };
        return apply(op, [x, weight, bias]).into_tensor();
    }
    let ConvGeometry {
        stride,
        padding,
        groups,
    } = geometry;
    let options = ConvOptions::new([stride; 2], [padding; 2], [1, 1], groups);
    let x = x.permute([0, 3, 1, 2]);
    let y = burn_conv2d(x, weight.clone(), bias.cloned(), options);
    activate(activation, y.permute([0, 2, 3, 1]))
}

/// [`conv2d`] with weights packed once, on the CPU and without gradients.
///
/// # Panics
/// If `x` is not an `f32` tensor on the CPU, or its channels are not the convolution's.
pub fn conv2d_packed(
    x: Tensor<4>,
    weight: &PackedConv2d,
    bias: Option<&[f32]>,
    activation: Activation,
) -> Tensor<4> {
    let [batch, height, width, _] = x.dims();
    let [out_height, out_width, channels] = weight.output_dims([height, width]);
    let size = [batch, height, width];
    let _scope = profile::scope(|| {
        let name = format!("PackedConv2d {:?} -> {channels}", x.dims());
        (name, weight.flop(size))
    });
    let mut y = vec![0.0; batch * out_height * out_width * channels];
    let epilogue = Epilogue {
        bias,
        activation,
        pre_activation: None,
    };
    kernel(weight.forward(host_array(&x).data(), size, &mut y, false, epilogue));
    Array::new(y, &[batch, out_height, out_width, channels]).into_tensor()
}

#[derive(Clone, Copy, Debug)]
struct ConvOp {
    geometry: ConvGeometry,
    activation: Activation,
    precision: Precision,
}

impl ConvOp {
    fn sizes(&self, x: &Array, weight: &Array) -> Conv2d {
        let (x, weight) = (x.dims(), weight.dims());
        let ConvGeometry {
            stride,
            padding,
            groups,
        } = self.geometry;
        Conv2d {
            batch: x[0],
            height: x[1],
            width: x[2],
            in_channels: x[3],
            out_channels: weight[0],
            kernel: [weight[2], weight[3]],
            stride,
            padding,
            groups,
        }
    }
}

impl FusedOp<3> for ConvOp {
    /// The value before the activation, when there is one.
    type Saved = Option<Array>;

    fn forward(&self, [x, weight, bias]: &[Array; 3], keep: bool) -> (Array, Self::Saved) {
        let conv = self.sizes(x, weight);
        let dims = [
            conv.batch,
            conv.out_height(),
            conv.out_width(),
            conv.out_channels,
        ];
        let mut y = vec![0.0; conv.output_len()];
        let keep = keep && self.activation != Activation::None;
        let mut before = if keep { vec![0.0; y.len()] } else { Vec::new() };
        let epilogue = Epilogue {
            bias: bias.optional(),
            activation: self.activation,
            pre_activation: keep.then_some(before.as_mut_slice()),
        };
        let (x, weight) = (x.data(), weight.data());
        kernel(conv2d_forward(
            &conv,
            x,
            weight,
            &mut y,
            false,
            epilogue,
            self.precision,
        ));
        (
            Array::new(y, &dims),
            keep.then(|| Array::new(before, &dims)),
        )
    }

    fn backward(
        &self,
        [x, weight, bias]: &[Array; 3],
        saved: &Self::Saved,
        grad: &Array,
        needed: [bool; 3],
    ) -> [Option<Array>; 3] {
        let conv = self.sizes(x, weight);
        let through;
        let dy = match saved {
            Some(before) => {
                through = activation_backward(self.activation, before.data(), grad.data());
                through.as_slice()
            }
            None => grad.data(),
        };
        let dx = needed[0].then(|| {
            let mut dx = vec![0.0; x.len()];
            kernel(conv2d_backward_input(
                &conv,
                dy,
                weight.data(),
                &mut dx,
                self.precision,
            ));
            Array::new(dx, &x.dims())
        });
        let dw = needed[1].then(|| {
            let mut dw = vec![0.0; weight.len()];
            let x = x.data();
            kernel(conv2d_backward_weight(
                &conv,
                x,
                dy,
                &mut dw,
                false,
                self.precision,
            ));
            Array::new(dw, &weight.dims())
        });
        let db = (needed[2] && bias.len() > 0).then(|| {
            let out = conv.out_channels;
            let mut db = vec![0.0; out];
            let dy = kernel(MatRef::row_major(dy, dy.len() / out, out));
            kernel(column_sum(dy, &mut db, false));
            Array::new(db, &[out])
        });
        [dx, dw, db]
    }
    fn operations(&self, [x, weight, _]: &[Array; 3]) -> f64 {
        let conv = self.sizes(x, weight);
        let per_output = conv.in_channels / conv.groups.max(1) * conv.kernel[0] * conv.kernel[1];
        2.0 * conv.output_len() as f64 * per_output as f64
    }
}
