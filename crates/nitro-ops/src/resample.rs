//! Moving between space and channels, channel-last, in PyTorch's channel order.

use burn::tensor::Tensor;
use nitro_kernels::resample::{self, ImageShape};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::kernel;

/// `torch.nn.PixelUnshuffle`: `[b, h, w, c] -> [b, h / r, w / r, c r r]`, channel `c r r + dy r + dx`.
pub fn pixel_unshuffle(x: Tensor<4>, r: usize) -> Tensor<4> {
    if let Some(x) = Handle::of(&x) {
        return apply(Resample::Unshuffle(r), [x]).into_tensor();
    }
    let [b, h, w, c] = x.dims();
    x.reshape([b, h / r, r, w / r, r, c])
        .permute([0, 1, 3, 5, 2, 4])
        .reshape([b, h / r, w / r, c * r * r])
}

/// `torch.nn.PixelShuffle`: `[b, h, w, c r r] -> [b, h r, w r, c]`.
pub fn pixel_shuffle(x: Tensor<4>, r: usize) -> Tensor<4> {
    if let Some(x) = Handle::of(&x) {
        return apply(Resample::Shuffle(r), [x]).into_tensor();
    }
    let [b, h, w, c] = x.dims();
    let c = c / (r * r);
    x.reshape([b, h, w, c, r, r])
        .permute([0, 1, 4, 2, 5, 3])
        .reshape([b, h * r, w * r, c])
}

/// Nearest-neighbour upsampling by two: `[b, h, w, c] -> [b, 2 h, 2 w, c]`.
pub fn upsample_nearest_2x(x: Tensor<4>) -> Tensor<4> {
    if let Some(x) = Handle::of(&x) {
        return apply(Resample::Nearest2x, [x]).into_tensor();
    }
    let [b, h, w, c] = x.dims();
    x.reshape([b, h, 1, w, 1, c])
        .expand([b, h, 2, w, 2, c])
        .reshape([b, 2 * h, 2 * w, c])
}

#[derive(Clone, Copy, Debug)]
enum Resample {
    Unshuffle(usize),
    Shuffle(usize),
    Nearest2x,
}

/// The shape of an image with sides and channels changed by whole factors.
fn scaled(x: &Array, up: usize, down: usize, channels: impl Fn(usize) -> usize) -> ImageShape {
    let dims = x.dims();
    ImageShape {
        batch: dims[0],
        height: dims[1] * up / down,
        width: dims[2] * up / down,
        channels: channels(dims[3]),
    }
}

fn dims(shape: ImageShape) -> [usize; 4] {
    [shape.batch, shape.height, shape.width, shape.channels]
}

fn unshuffle(x: &Array, r: usize) -> Array {
    let mut y = vec![0.0; x.len()];
    kernel(resample::pixel_unshuffle(
        scaled(x, 1, 1, |c| c),
        r,
        x.data(),
        &mut y,
    ));
    Array::new(y, &dims(scaled(x, 1, r, |c| c * r * r)))
}

fn shuffle(x: &Array, r: usize) -> Array {
    let shape = scaled(x, r, 1, |c| c / (r * r));
    let mut y = vec![0.0; x.len()];
    kernel(resample::pixel_shuffle(shape, r, x.data(), &mut y));
    Array::new(y, &dims(shape))
}

impl FusedOp<1> for Resample {
    type Saved = ();

    fn forward(&self, [x]: &[Array; 1], _: bool) -> (Array, ()) {
        let y = match *self {
            Self::Unshuffle(r) => unshuffle(x, r),
            Self::Shuffle(r) => shuffle(x, r),
            Self::Nearest2x => {
                let mut y = vec![0.0; 4 * x.len()];
                kernel(resample::upsample2x_forward(
                    scaled(x, 1, 1, |c| c),
                    x.data(),
                    &mut y,
                ));
                Array::new(y, &dims(scaled(x, 2, 1, |c| c)))
            }
        };
        (y, ())
    }

    fn backward(
        &self,
        [x]: &[Array; 1],
        (): &(),
        grad: &Array,
        _: [bool; 1],
    ) -> [Option<Array>; 1] {
        // Shuffling and unshuffling are permutations: each is the other's transpose.
        [Some(match *self {
            Self::Unshuffle(r) => shuffle(grad, r),
            Self::Shuffle(r) => unshuffle(grad, r),
            Self::Nearest2x => {
                let mut dx = vec![0.0; x.len()];
                kernel(resample::upsample2x_backward(
                    scaled(x, 1, 1, |c| c),
                    grad.data(),
                    &mut dx,
                ));
                Array::new(dx, &x.dims())
            }
        })]
    }
}
