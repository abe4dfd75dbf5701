//! Between the groups: the image grid to a few tokens, and back.

use burn::tensor::Tensor;
use nitro_ops::{Activation, pixel_shuffle, pixel_unshuffle};

use crate::layers::Linear;
use crate::{Params, WeightError};

/// Two 1x1 convolutions with GELU between them.
#[derive(Clone, Debug)]
struct Body([Linear; 2]);

impl Body {
    fn new(p: &Params<'_>, inputs: usize, width: usize) -> Result<Self, WeightError> {
        Ok(Self([
            Linear::pointwise(&p.sub(1), inputs, width, true)?,
            Linear::pointwise(&p.sub(3), width, width, true)?,
        ]))
    }

    fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        self.0[1].forward(self.0[0].forward_with(x, Activation::GeluTanh))
    }
}

/// The grid seen at half and at a quarter of its resolution.
#[derive(Clone, Debug)]
pub(super) struct Compressor {
    body2x: Body,
    body4x: Body,
}

impl Compressor {
    pub(super) fn new(p: &Params<'_>, width: usize) -> Result<Self, WeightError> {
        Ok(Self {
            body2x: Body::new(&p.sub("body2x"), 4 * width, width)?,
            body4x: Body::new(&p.sub("body4x"), 16 * width, width)?,
        })
    }

    /// `[B, h w, D] -> [B, h w / 4 + h w / 16, D]`.
    pub(super) fn forward(&self, x: Tensor<3>, [h, w]: [usize; 2]) -> Tensor<3> {
        let [b, _, d] = x.dims();
        let x = x.reshape([b, h, w, d]);
        let path = |body: &Body, r: usize| {
            body.forward(pixel_unshuffle(x.clone(), r))
                .reshape([b, h / r * (w / r), d])
        };
        Tensor::cat(vec![path(&self.body2x, 2), path(&self.body4x, 4)], 1)
    }
}

/// Both resolutions brought back to the grid and merged with what it was before compression.
#[derive(Clone, Debug)]
pub(super) struct Reconstructor {
    body2x: Body,
    body4x: Body,
    mergers: [Linear; 2],
}

impl Reconstructor {
    pub(super) fn new(p: &Params<'_>, width: usize) -> Result<Self, WeightError> {
        Ok(Self {
            body2x: Body::new(&p.sub("body2x"), width / 4, width)?,
            body4x: Body::new(&p.sub("body4x"), width / 16, width)?,
            mergers: [
                Linear::new(&p.sub("mergers.0"), 3 * width, width)?,
                Linear::new(&p.sub("mergers.2"), width, width)?,
            ],
        })
    }

    /// `x [B, h w / 4 + h w / 16, D]` and `skip [B, h w, D]` to `[B, h w, D]`.
    pub(super) fn forward(&self, x: Tensor<3>, skip: Tensor<3>, [h, w]: [usize; 2]) -> Tensor<3> {
        let [b, tokens, d] = x.dims();
        let half = h * w / 4;
        let path = |body: &Body, range: std::ops::Range<usize>, r: usize| {
            let x = x.clone().slice_dim(1, range).reshape([b, h / r, w / r, d]);
            body.forward(pixel_shuffle(x, r)).reshape([b, h * w, d])
        };
        let parts = vec![
            path(&self.body2x, 0..half, 2),
            path(&self.body4x, half..tokens, 4),
            skip,
        ];
        let merged = self.mergers[0].forward_with(Tensor::cat(parts, 2), Activation::GeluTanh);
        self.mergers[1].forward(merged)
    }
}
