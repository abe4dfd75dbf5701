//! Rotary position embedding in its half-split form.

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of a sequence's rotation angles.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor<4>, // [1, tokens, 1, head_dim / 2]
    sin: Tensor<4>,
    tables: [Vec<f32>; 2], // the same on the host, [tokens, head_dim / 2] each
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
        let tables: [Vec<f32>; 2] = [
            angles.clone().map(f32::cos).collect(),
            angles.map(f32::sin).collect(),
        ];
        Self {
            cos: table(tables[0].clone()),
            sin: table(tables[1].clone()),
            tables,
            head_dim,
        }
    }

    /// Channels of a head.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines, `[tokens, head_dim / 2]` each.
    pub(super) fn tables(&self) -> (&[f32], &[f32]) {
        (&self.tables[0], &self.tables[1])
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
