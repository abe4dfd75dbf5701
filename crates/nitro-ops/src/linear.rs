//! `y = activation(x W^T + b)`.

use burn::tensor::{Tensor, activation};

use crate::Precision;

/// The activation applied to a linear layer's or convolution's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Activation {
    /// Identity.
    #[default]
    None,
    /// GELU, tanh approximation.
    GeluTanh,
    /// SiLU (swish).
    Silu,
    /// ReLU.
    Relu,
}

impl Activation {
    /// The composed form.
    pub(crate) fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::None => x,
            Self::GeluTanh => crate::gelu_tanh(x),
            Self::Silu => crate::silu(x),
            Self::Relu => activation::relu(x),
        }
    }
}

/// A linear layer over the last dimension: `x [.., in]`, `weight [out, in]` and `bias [out]` as in
/// `torch.nn.Linear`, giving `[.., out]`.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    activation: Activation,
    _precision: Precision,
) -> Tensor<D> {
    let mut dims = x.dims();
    let [out, inner] = weight.dims();
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = out;
    let y = x.reshape([rows, inner]).matmul(weight.clone().transpose());
    let y = match bias {
        Some(bias) => y + bias.clone().reshape([1, out]),
        None => y,
    };
    activation.apply(y.reshape(dims))
}
