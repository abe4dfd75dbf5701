//! Pointwise operations that the models use between matrix products.

use burn::tensor::{Tensor, activation};

/// GELU in its tanh approximation: `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044_715)
        * core::f64::consts::FRAC_2_PI.sqrt();
    x * (inner.tanh() + 1.0) * 0.5
}

/// SiLU: `x sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone() * activation::sigmoid(x)
}

/// `value * silu(gate)`, elementwise: SwiGLU's product, and DC-AE's gated convolution.
pub fn silu_gated<const D: usize>(value: Tensor<D>, gate: Tensor<D>) -> Tensor<D> {
    value * silu(gate)
}

/// `x + gate * branch`: the residual of an AdaLN block.
/// `x` and `branch` are `[batch, tokens, channels]`, `gate` is `[batch, channels]`.
pub fn gate_residual(x: Tensor<3>, gate: Tensor<2>, branch: Tensor<3>) -> Tensor<3> {
    x + branch * gate.unsqueeze_dim::<3>(1)
}
