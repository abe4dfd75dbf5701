//! Softmax attention over one or two token streams, and DC-AE's ReLU linear attention.

use burn::tensor::{Bool, Tensor, activation};

/// Queries, keys and values of one token stream, each `[batch, tokens, heads * head_dim]`
/// (keys and values: `kv_heads * head_dim`).
#[derive(Clone, Debug)]
pub struct Qkv {
    /// Queries.
    pub q: Tensor<3>,
    /// Keys.
    pub k: Tensor<3>,
    /// Values.
    pub v: Tensor<3>,
}

/// The static part of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Alternating subregion attention: the number `s` of groups that attend among themselves.
    pub groups: usize,
    /// Alternating subregion attention: the run length `n`; token `(l s + g) n + i` is in group `g`.
    pub run: usize,
    /// Whether a query sees only itself and earlier keys.
    pub causal: bool,
}

impl AttentionShape {
    /// Full attention of `heads` heads.
    pub fn full(heads: usize) -> Self {
        Self { heads, kv_heads: heads, groups: 1, run: 1, causal: false }
    }
}

/// Joint attention of an image and a text stream: tokens of both attend to all tokens of both, or,
/// with `shape.groups > 1`, to those of their own subregion (E-MMDiT's ASA: each stream is regrouped
/// as `b (l s n) c -> (b s) (l n) c`). Scale is `head_dim^-0.5`; there is no mask.
///
/// Returns the image's and the text's outputs, each `[batch, tokens, heads * head_dim]`.
pub fn joint_attention(image: Qkv, text: Qkv, shape: AttentionShape) -> (Tensor<3>, Tensor<3>) {
    let [batch, image_tokens, _] = image.q.dims();
    let [_, text_tokens, _] = text.q.dims();
    let join = |a: Tensor<3>, b: Tensor<3>| {
        Tensor::cat(vec![to_groups(a, &shape), to_groups(b, &shape)], 1)
    };
    let q = join(image.q, text.q);
    let k = join(image.k, text.k);
    let v = join(image.v, text.v);
    let y = softmax_attention(q, k, v, &shape, None);
    let split = image_tokens / shape.groups;
    let tokens = split + text_tokens / shape.groups;
    let image = from_groups(y.clone().slice_dim(1, 0..split), batch, &shape);
    let text = from_groups(y.slice_dim(1, split..tokens), batch, &shape);
    (image, text)
}

/// Attention within one stream; `key_mask [batch, tokens]` is true where a key may be seen.
/// A query that sees no key gives zeros.
pub fn attention(qkv: Qkv, shape: AttentionShape, key_mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
    softmax_attention(qkv.q, qkv.k, qkv.v, &shape, key_mask)
}

/// `b (l s n) c -> (b s) (l n) c`.
fn to_groups(x: Tensor<3>, shape: &AttentionShape) -> Tensor<3> {
    let (s, n) = (shape.groups, shape.run);
    if s == 1 {
        return x;
    }
    let [b, t, c] = x.dims();
    x.reshape([b, t / (s * n), s, n, c]).swap_dims(1, 2).reshape([b * s, t / s, c])
}

/// `(b s) (l n) c -> b (l s n) c`.
fn from_groups(x: Tensor<3>, b: usize, shape: &AttentionShape) -> Tensor<3> {
    let (s, n) = (shape.groups, shape.run);
    if s == 1 {
        return x;
    }
    let [_, t, c] = x.dims();
    x.reshape([b, s, t / n, n, c]).swap_dims(1, 2).reshape([b, t * s, c])
}

fn softmax_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    shape: &AttentionShape,
    key_mask: Option<Tensor<2, Bool>>,
) -> Tensor<3> {
    let [b, t, c] = q.dims();
    let d = c / shape.heads;
    let repeat = shape.heads / shape.kv_heads;
    // [b, t, h d] -> [b, h, t, d]
    let heads = |x: Tensor<3>, h: usize| x.reshape([b, t, h, d]).swap_dims(1, 2);
    let expand = |x: Tensor<4>| {
        // [b, kv, t, d] -> [b, kv * repeat, t, d], each head `repeat` times in a row
        x.unsqueeze_dim::<5>(2).repeat_dim(2, repeat).reshape([b, shape.heads, t, d])
    };
    let q = heads(q, shape.heads);
    let k = expand(heads(k, shape.kv_heads));
    let v = expand(heads(v, shape.kv_heads));
    let mut scores = q.matmul(k.swap_dims(2, 3)) * (d as f64).powf(-0.5); // [b, h, t, t]
    if shape.causal {
        let hidden = Tensor::<2, Bool>::tril_mask([t, t], 0, &scores.device());
        scores = scores.mask_fill(hidden.unsqueeze::<4>().expand([b, shape.heads, t, t]), -1e30);
    }
    if let Some(mask) = key_mask {
        let hidden = mask.bool_not().reshape([b, 1, 1, t]).expand([b, shape.heads, t, t]);
        scores = scores.mask_fill(hidden, -1e30);
    }
    let y = activation::softmax(scores, 3).matmul(v); // [b, h, t, d]
    y.swap_dims(1, 2).reshape([b, t, c])
}

/// DC-AE's multi-scale linear attention (`SanaMultiscaleLinearAttention`): per group of
/// `3 * head_dim` channels, `relu(q)`, `relu(k)` and `v` lie one after the other;
/// `out_i = sum_j v_j (k_j . q_i) / (sum_j k_j . q_i + eps)`.
///
/// `qkv [batch, tokens, groups * 3 * head_dim]` gives `[batch, tokens, groups * head_dim]`.
/// The official code has a linear and, for few tokens, a quadratic form; both are this sum, and the
/// linear one is computed. All in `f32`: half precision smears the normalisation.
pub fn relu_linear_attention(qkv: Tensor<3>, head_dim: usize, eps: f64) -> Tensor<3> {
    let [b, n, c] = qkv.dims();
    let groups = c / (3 * head_dim);
    let qkv = qkv.reshape([b, n, groups, 3 * head_dim]).swap_dims(1, 2); // [b, g, n, 3d]
    let q = activation::relu(qkv.clone().slice_dim(3, 0..head_dim));
    let k = activation::relu(qkv.clone().slice_dim(3, head_dim..2 * head_dim));
    let v = qkv.slice_dim(3, 2 * head_dim..3 * head_dim);
    let kv = k.clone().swap_dims(2, 3).matmul(v); // [b, g, d, d]
    let k_sum = k.sum_dim(2).swap_dims(2, 3); // [b, g, d, 1]
    let numerator = q.clone().matmul(kv); // [b, g, n, d]
    let denominator = q.matmul(k_sum) + eps; // [b, g, n, 1]
    (numerator / denominator).swap_dims(1, 2).reshape([b, n, groups * head_dim])
}
