//! Attention whose queries and keys come from different places, or whose scores carry a bias.

use burn::tensor::{Tensor, activation};

/// `softmax(q k^T / sqrt(head_dim) + bias) v` for each of `heads` heads.
///
/// `q [batch, queries, heads * head_dim]`, `k` and `v` `[batch, keys, heads * head_dim]`; `bias` is
/// added to the scores `[batch, heads, queries, keys]` and may have ones in their place (a window's
/// position bias, or a mask of large negative numbers). Gives `[batch, queries, heads * head_dim]`.
///
/// There is a composed form only: where it is used (a text reading an image, the windows and queries
/// of a detector) the products around it are the cost.
pub fn cross_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    heads: usize,
    bias: Option<Tensor<4>>,
) -> Tensor<3> {
    let [batch, queries, channels] = q.dims();
    let dim = channels / heads;
    // [b, t, h d] -> [b, h, t, d]
    let split = |x: Tensor<3>| {
        let [_, tokens, _] = x.dims();
        x.reshape([batch, tokens, heads, dim]).swap_dims(1, 2)
    };
    let q = split(q * (dim as f64).powf(-0.5));
    let mut scores = q.matmul(split(k).swap_dims(2, 3)); // [b, h, q, k]
    if let Some(bias) = bias {
        scores = scores + bias;
    }
    activation::softmax(scores, 3)
        .matmul(split(v))
        .swap_dims(1, 2)
        .reshape([batch, queries, channels])
}
