//! `y = activation(x W^T + b)`.

use burn::tensor::{Tensor, activation};
use nitro_kernels::elementwise;
use nitro_kernels::gemm::{Epilogue, MatRef, column_sum, gemm, gemm_by_rows};

use crate::Precision;
use crate::fused::{Array, FusedOp, Handle, apply};

pub use nitro_kernels::gemm::Activation;

/// An activation by itself, composed of Burn operations.
pub fn activate<const D: usize>(activation: Activation, x: Tensor<D>) -> Tensor<D> {
    match activation {
        Activation::None => x,
        Activation::GeluTanh => crate::gelu_tanh(x),
        Activation::Silu => crate::silu(x),
        Activation::Relu => activation::relu(x),
    }
}

/// The gradient before the activation, from that after it; `before` is the activation's input.
pub(crate) fn activation_backward(
    activation: Activation,
    before: &[f32],
    grad: &[f32],
) -> Vec<f32> {
    let mut out = vec![0.0; grad.len()];
    match activation {
        Activation::None => out.copy_from_slice(grad),
        Activation::GeluTanh => kernel(elementwise::gelu_tanh_backward(before, grad, &mut out)),
        Activation::Silu => kernel(elementwise::silu_backward(before, grad, &mut out)),
        Activation::Relu => {
            for ((out, grad), before) in out.iter_mut().zip(grad).zip(before) {
                *out = if *before > 0.0 { *grad } else { 0.0 };
            }
        }
    }
    out
}

/// A linear layer over the last dimension: `x [.., in]`, `weight [out, in]` and `bias [out]` as in
/// `torch.nn.Linear`, giving `[.., out]`.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    activation: Activation,
    precision: Precision,
) -> Tensor<D> {
    let inputs = (
        Handle::of(&x),
        Handle::of(weight),
        Handle::optional(&bias.cloned()),
    );
    if let (Some(x), Some(weight), Some(bias)) = inputs {
        return apply(
            LinearOp {
                activation,
                precision,
            },
            [x, weight, bias],
        )
        .into_tensor();
    }
    let mut dims = x.dims();
    let [out, inner] = weight.dims();
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = out;
    let y = x.reshape([rows, inner]).matmul(weight.clone().transpose());
    let y = match bias {
        Some(bias) => y + bias.clone().reshape([1, out]),
        None => y,
    };
    activate(activation, y.reshape(dims))
}

#[derive(Clone, Copy, Debug)]
struct LinearOp {
    activation: Activation,
    precision: Precision,
}

impl FusedOp<3> for LinearOp {
    /// The value before the activation, when there is one.
    type Saved = Option<Array>;

    fn forward(&self, [x, weight, bias]: &[Array; 3], keep: bool) -> (Array, Self::Saved) {
        let mut dims = x.dims();
        let (out, inner) = (weight.dims()[0], weight.dims()[1]);
        let rows = x.len() / inner.max(1);
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        let mut y = vec![0.0; rows * out];
        let keep = keep && self.activation != Activation::None;
        let mut before = if keep {
            vec![0.0; rows * out]
        } else {
            Vec::new()
        };
        let epilogue = Epilogue {
            bias: bias.optional(),
            activation: self.activation,
            pre_activation: keep.then_some(before.as_mut_slice()),
        };
        let a = matrix(x.data(), rows, inner);
        let b = matrix(weight.data(), out, inner).t();
        // A sample's result must not depend on its batch.
        kernel(gemm_by_rows(a, b, &mut y, out, epilogue, self.precision));
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
        let (out, inner) = (weight.dims()[0], weight.dims()[1]);
        let rows = x.len() / inner.max(1);
        let through;
        let dy = match saved {
            Some(before) => {
                through = activation_backward(self.activation, before.data(), grad.data());
                through.as_slice()
            }
            None => grad.data(),
        };
        let dy = matrix(dy, rows, out);
        let none = Epilogue::default;
        let dx = needed[0].then(|| {
            let mut dx = vec![0.0; rows * inner];
            let weight = matrix(weight.data(), out, inner);
            kernel(gemm(
                dy,
                weight,
                &mut dx,
                inner,
                false,
                none(),
                self.precision,
            ));
            Array::new(dx, &x.dims())
        });
        let dw = needed[1].then(|| {
            let mut dw = vec![0.0; out * inner];
            let x = matrix(x.data(), rows, inner);
            kernel(gemm(
                dy.t(),
                x,
                &mut dw,
                inner,
                false,
                none(),
                self.precision,
            ));
            Array::new(dw, &[out, inner])
        });
        let db = (needed[2] && bias.len() > 0).then(|| {
            let mut db = vec![0.0; out];
            kernel(column_sum(dy, &mut db, false));
            Array::new(db, &[out])
        });
        [dx, dw, db]
    }

    fn operations(&self, [x, weight, _]: &[Array; 3]) -> f64 {
        2.0 * x.len() as f64 * weight.dims()[0] as f64
    }
}

fn matrix(data: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
    kernel(MatRef::row_major(data, rows, cols))
}

/// The result of a kernel whose arguments follow from tensor shapes.
///
/// Shapes that do not fit are a mistake in a model, as with Burn's own operations, which panic on
/// them as well; every input from outside is checked long before.
pub(crate) fn kernel<T>(result: Result<T, nitro_kernels::error::KernelError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("tensor shapes do not fit: {error}"),
    }
}
