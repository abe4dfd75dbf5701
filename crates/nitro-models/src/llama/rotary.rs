//! Rotary position embedding in its half-split form.

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of a sequence's rotation angles.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor<4>, // [1, tokens, 1, head_dim / 2]
    sin: Tensor<4>,
    head_dim: usize,
}

impl Rotary {
    /// The tables of positions `0..tokens`; angles are rounded to `f32` as the reference does.
    pub(super) fn new(
        inverse_frequencies: &[f32],
        tokens: usize,
        head_dim: usize,
        device: &Device,
    ) -> Self {
        let half = head_dim / 2;
        let angles = (0..tokens).flat_map(|position| {
            inverse_frequencies
                .iter()
                .map(move |frequency| position as f32 * frequency)
        });
        let table = |values: Vec<f32>| -> Tensor<4> {
            Tensor::from_data(TensorData::new(values, [1, tokens, 1, half]), device)
        };
        Self {
            cos: table(angles.clone().map(f32::cos).collect()),
            sin: table(angles.map(f32::sin).collect()),
            head_dim,
        }
    }

    /// Rotates each head of `x [b, t, heads head_dim]`: channel `i` of its first half with channel
    /// `i` of its second.
    pub(super) fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let [b, t, c] = x.dims();
        let half = self.head_dim / 2;
        let x = x.reshape([b, t, c / self.head_dim, self.head_dim]);
        let first = x.clone().slice_dim(3, 0..half); // [b, t, heads, half]
        let second = x.slice_dim(3, half..self.head_dim);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let rotated = vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos + first * sin,
        ];
        Tensor::cat(rotated, 3).reshape([b, t, c])
    }
}
