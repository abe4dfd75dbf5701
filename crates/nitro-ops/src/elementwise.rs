//! Pointwise operations that the models use between matrix products.

use burn::tensor::{Tensor, activation};
use nitro_kernels::{elementwise, gelu as exact};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::kernel;

/// GELU in its exact form: `0.5 x (1 + erf(x / sqrt(2)))`.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if let Some(x) = Handle::of(&x) {
        return apply(Pointwise::Gelu, [x]).into_tensor();
    }
    activation::gelu(x)
}

/// GELU in its tanh approximation: `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if let Some(x) = Handle::of(&x) {
        return apply(Pointwise::GeluTanh, [x]).into_tensor();
    }
    let inner =
        (x.clone() + x.clone().powi_scalar(3) * 0.044_715) * core::f64::consts::FRAC_2_PI.sqrt();
    x * (inner.tanh() + 1.0) * 0.5
}

/// OpenAI's cheaper GELU, `x sigmoid(1.702 x)`.
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    const SLOPE: f64 = 1.702;
    silu(x * SLOPE) / SLOPE
}

/// SiLU: `x sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if let Some(x) = Handle::of(&x) {
        return apply(Pointwise::Silu, [x]).into_tensor();
    }
    x.clone() * activation::sigmoid(x)
}

/// `value * silu(gate)`, elementwise: SwiGLU's product, and DC-AE's gated convolution.
pub fn silu_gated<const D: usize>(value: Tensor<D>, gate: Tensor<D>) -> Tensor<D> {
    if let (Some(value), Some(gate)) = (Handle::of(&value), Handle::of(&gate)) {
        return apply(SiluGated, [value, gate]).into_tensor();
    }
    value * silu(gate)
}

/// `x + gate * branch`: the residual of an AdaLN block.
/// `x` and `branch` are `[batch, tokens, channels]`, `gate` is `[batch, channels]`.
pub fn gate_residual(x: Tensor<3>, gate: Tensor<2>, branch: Tensor<3>) -> Tensor<3> {
    let inputs = (Handle::of(&x), Handle::of(&gate), Handle::of(&branch));
    if let (Some(x), Some(gate), Some(branch)) = inputs {
        return apply(GateResidual, [x, gate, branch]).into_tensor();
    }
    x + branch * gate.unsqueeze_dim::<3>(1)
}

#[derive(Clone, Copy, Debug)]
enum Pointwise {
    Gelu,
    GeluTanh,
    Silu,
}

impl FusedOp<1> for Pointwise {
    type Saved = ();

    fn forward(&self, [x]: &[Array; 1], _: bool) -> (Array, ()) {
        let mut y = vec![0.0; x.len()];
        kernel(match self {
            Self::Gelu => exact::gelu_forward(x.data(), &mut y),
            Self::GeluTanh => elementwise::gelu_tanh_forward(x.data(), &mut y),
            Self::Silu => elementwise::silu_forward(x.data(), &mut y),
        });
        (Array::new(y, &x.dims()), ())
    }

    fn backward(
        &self,
        [x]: &[Array; 1],
        (): &(),
        grad: &Array,
        _: [bool; 1],
    ) -> [Option<Array>; 1] {
        let mut dx = vec![0.0; x.len()];
        kernel(match self {
            Self::Gelu => exact::gelu_backward(x.data(), grad.data(), &mut dx),
            Self::GeluTanh => elementwise::gelu_tanh_backward(x.data(), grad.data(), &mut dx),
            Self::Silu => elementwise::silu_backward(x.data(), grad.data(), &mut dx),
        });
        [Some(Array::new(dx, &x.dims()))]
    }
}

#[derive(Clone, Copy, Debug)]
struct SiluGated;

impl FusedOp<2> for SiluGated {
    type Saved = ();

    fn forward(&self, [value, gate]: &[Array; 2], _: bool) -> (Array, ()) {
        let mut y = vec![0.0; value.len()];
        kernel(elementwise::swiglu_forward(
            gate.data(),
            value.data(),
            &mut y,
        ));
        (Array::new(y, &value.dims()), ())
    }

    fn backward(
        &self,
        [value, gate]: &[Array; 2],
        (): &(),
        grad: &Array,
        _: [bool; 2],
    ) -> [Option<Array>; 2] {
        let (mut dvalue, mut dgate) = (vec![0.0; value.len()], vec![0.0; gate.len()]);
        let (value_data, gate_data) = (value.data(), gate.data());
        kernel(elementwise::swiglu_backward(
            gate_data,
            value_data,
            grad.data(),
            &mut dgate,
            &mut dvalue,
        ));
        [
            Some(Array::new(dvalue, &value.dims())),
            Some(Array::new(dgate, &gate.dims())),
        ]
    }
}

#[derive(Clone, Copy, Debug)]
struct GateResidual;

impl FusedOp<3> for GateResidual {
    type Saved = ();

    fn forward(&self, [x, gate, branch]: &[Array; 3], _: bool) -> (Array, ()) {
        let dims = x.dims();
        let mut y = vec![0.0; x.len()];
        kernel(elementwise::gate_residual_forward(
            dims[2],
            x.data(),
            gate.data(),
            branch.data(),
            &mut y,
        ));
        (Array::new(y, &dims), ())
    }

    fn backward(
        &self,
        [x, gate, branch]: &[Array; 3],
        (): &(),
        grad: &Array,
        _: [bool; 3],
    ) -> [Option<Array>; 3] {
        let (mut dbranch, mut dgate) = (vec![0.0; branch.len()], vec![0.0; gate.len()]);
        kernel(elementwise::gate_residual_backward(
            x.dims()[2],
            grad.data(),
            gate.data(),
            branch.data(),
            &mut dbranch,
            &mut dgate,
        ));
        [
            Some(grad.clone()),
            Some(Array::new(dgate, &gate.dims())),
            Some(Array::new(dbranch, &branch.dims())),
        ]
    }
}
