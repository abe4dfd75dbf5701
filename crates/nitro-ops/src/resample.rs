//! Moving between space and channels, channel-last, in PyTorch's channel order.

use burn::tensor::Tensor;

/// `torch.nn.PixelUnshuffle`: `[b, h, w, c] -> [b, h / r, w / r, c r r]`, channel `c r r + dy r + dx`.
pub fn pixel_unshuffle(x: Tensor<4>, r: usize) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    x.reshape([b, h / r, r, w / r, r, c])
        .permute([0, 1, 3, 5, 2, 4])
        .reshape([b, h / r, w / r, c * r * r])
}

/// `torch.nn.PixelShuffle`: `[b, h, w, c r r] -> [b, h r, w r, c]`.
pub fn pixel_shuffle(x: Tensor<4>, r: usize) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let c = c / (r * r);
    x.reshape([b, h, w, c, r, r]).permute([0, 1, 4, 2, 5, 3]).reshape([b, h * r, w * r, c])
}

/// Nearest-neighbour upsampling by two: `[b, h, w, c] -> [b, 2 h, 2 w, c]`.
pub fn upsample_nearest_2x(x: Tensor<4>) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    x.reshape([b, h, 1, w, 1, c]).expand([b, h, 2, w, 2, c]).reshape([b, 2 * h, 2 * w, c])
}
