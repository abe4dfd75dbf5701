//! Softmax attention over one or two token streams, and DC-AE's ReLU linear attention.

use std::sync::Arc;

use burn::tensor::{Bool, Tensor, activation};
use nitro_kernels::attention::{
    AttentionConfig, LinearAttentionShape, Segment, SegmentGrads, attention_backward,
    attention_forward, relu_linear_attention_backward, relu_linear_attention_forward,
};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::kernel;

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

impl Qkv {
    fn handles(&self) -> Option<[Handle; 3]> {
        Some([
            Handle::of(&self.q)?,
            Handle::of(&self.k)?,
            Handle::of(&self.v)?,
        ])
    }
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
        Self {
            heads,
            kv_heads: heads,
            groups: 1,
            run: 1,
            causal: false,
        }
    }
}

/// Joint attention of an image and a text stream: tokens of both attend to all tokens of both, or,
/// with `shape.groups > 1`, to those of their own subregion (E-MMDiT's ASA: each stream is regrouped
/// as `b (l s n) c -> (b s) (l n) c`). Scale is `head_dim^-0.5`; there is no mask.
///
/// Returns the image's and the text's outputs, each `[batch, tokens, heads * head_dim]`.
pub fn joint_attention(image: Qkv, text: Qkv, shape: AttentionShape) -> (Tensor<3>, Tensor<3>) {
    let [batch, image_tokens, _] = image.q.dims();
    let [_, text_tokens, width] = text.q.dims();
    if let (Some([iq, ik, iv]), Some([tq, tk, tv])) = (image.handles(), text.handles()) {
        // Both outputs in one array, one after the other.
        let op = AttentionOp {
            shape,
            segments: 2,
            key_mask: None,
        };
        let both: Tensor<1> = apply(op, [iq, ik, iv, tq, tk, tv]).into_tensor();
        let split = batch * image_tokens * width;
        let end = split + batch * text_tokens * width;
        let image = both
            .clone()
            .slice(0..split)
            .reshape([batch, image_tokens, width]);
        return (
            image,
            both.slice(split..end).reshape([batch, text_tokens, width]),
        );
    }
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
    if let Some([q, k, v]) = qkv.handles() {
        let mask = key_mask.map(|mask| mask.into_data().iter::<bool>().collect::<Arc<[bool]>>());
        let op = AttentionOp {
            shape,
            segments: 1,
            key_mask: mask,
        };
        let y: Tensor<1> = apply(
            op,
            [
                q,
                k,
                v,
                Handle::absent(),
                Handle::absent(),
                Handle::absent(),
            ],
        )
        .into_tensor();
        return y.reshape(qkv.q.dims());
    }
    softmax_attention(qkv.q, qkv.k, qkv.v, &shape, key_mask)
}

/// `b (l s n) c -> (b s) (l n) c`.
fn to_groups(x: Tensor<3>, shape: &AttentionShape) -> Tensor<3> {
    let (s, n) = (shape.groups, shape.run);
    if s == 1 {
        return x;
    }
    let [b, t, c] = x.dims();
    x.reshape([b, t / (s * n), s, n, c])
        .swap_dims(1, 2)
        .reshape([b * s, t / s, c])
}

/// `(b s) (l n) c -> b (l s n) c`.
fn from_groups(x: Tensor<3>, b: usize, shape: &AttentionShape) -> Tensor<3> {
    let (s, n) = (shape.groups, shape.run);
    if s == 1 {
        return x;
    }
    let [_, t, c] = x.dims();
    x.reshape([b, s, t / n, n, c])
        .swap_dims(1, 2)
        .reshape([b, t * s, c])
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
        x.unsqueeze_dim::<5>(2)
            .repeat_dim(2, repeat)
            .reshape([b, shape.heads, t, d])
    };
    let q = heads(q, shape.heads);
    let k = expand(heads(k, shape.kv_heads));
    let v = expand(heads(v, shape.kv_heads));
    let mut scores = q.matmul(k.swap_dims(2, 3)) * (d as f64).powf(-0.5); // [b, h, t, t]
    if shape.causal {
        let hidden = Tensor::<2, Bool>::tril_mask([t, t], 0, &scores.device());
        scores = scores.mask_fill(
            hidden.unsqueeze::<4>().expand([b, shape.heads, t, t]),
            -1e30,
        );
    }
    if let Some(mask) = key_mask {
        let hidden = mask
            .bool_not()
            .reshape([b, 1, 1, t])
            .expand([b, shape.heads, t, t]);
        scores = scores.mask_fill(hidden, -1e30);
    }
    let y = activation::softmax(scores, 3).matmul(v); // [b, h, t, d]
    y.swap_dims(1, 2).reshape([b, t, c])
}

/// Attention over one or two segments; inputs are `q, k, v` of each, the output is the segments'
/// outputs one after the other.
#[derive(Clone, Debug)]
struct AttentionOp {
    shape: AttentionShape,
    segments: usize,
    key_mask: Option<Arc<[bool]>>,
}

impl AttentionOp {
    fn config(&self, q: &Array) -> AttentionConfig {
        let dims = q.dims();
        let AttentionShape {
            heads,
            kv_heads,
            groups,
            run,
            causal,
        } = self.shape;
        let joint = AttentionConfig::joint(dims[0], heads, dims[2] / heads);
        AttentionConfig {
            kv_heads,
            groups,
            run,
            causal,
            ..joint
        }
    }

    fn segments<'a>(&self, inputs: &'a [Array; 6]) -> Vec<Segment<'a>> {
        let segment = |qkv: &'a [Array]| Segment {
            q: qkv[0].data(),
            k: qkv[1].data(),
            v: qkv[2].data(),
            tokens: qkv[0].dims()[1],
        };
        inputs
            .chunks_exact(3)
            .take(self.segments)
            .map(segment)
            .collect()
    }

    /// Cuts an array of all segments' outputs at the end of the first.
    fn cut(&self, inputs: &[Array; 6]) -> usize {
        inputs[0].len()
    }
}

impl FusedOp<6> for AttentionOp {
    /// The output, and the logarithms of the softmax denominators `[batch, heads, tokens]`.
    type Saved = (Array, Array);

    fn forward(&self, inputs: &[Array; 6], _: bool) -> (Array, Self::Saved) {
        let config = self.config(&inputs[0]);
        let segments = self.segments(inputs);
        let tokens: usize = segments.iter().map(|segment| segment.tokens).sum();
        let size = inputs[0].len() + inputs[3].len();
        let (mut y, mut lse) = (
            vec![0.0; size],
            vec![0.0; config.batch * config.heads * tokens],
        );
        let (first, second) = y.split_at_mut(self.cut(inputs));
        let mut outs = [first, second];
        kernel(attention_forward(
            &config,
            &segments,
            self.key_mask.as_deref(),
            &mut outs[..self.segments],
            &mut lse,
        ));
        let lse = Array::new(lse, &[config.batch * config.heads * tokens]);
        let y = Array::new(y, &[size]);
        (y.clone(), (y, lse))
    }

    fn backward(
        &self,
        inputs: &[Array; 6],
        (y, lse): &Self::Saved,
        grad: &Array,
        _: [bool; 6],
    ) -> [Option<Array>; 6] {
        let (first, second) = y.data().split_at(self.cut(inputs));
        let (grad_first, grad_second) = grad.data().split_at(self.cut(inputs));
        let mut results = inputs.each_ref().map(|input| vec![0.0; input.len()]);
        let [iq, ik, iv, tq, tk, tv] = &mut results;
        let mut grads = [
            SegmentGrads {
                dq: iq,
                dk: ik,
                dv: iv,
            },
            SegmentGrads {
                dq: tq,
                dk: tk,
                dv: tv,
            },
        ];
        kernel(attention_backward(
            &self.config(&inputs[0]),
            &self.segments(inputs),
            self.key_mask.as_deref(),
            &[first, second][..self.segments],
            lse.data(),
            &[grad_first, grad_second][..self.segments],
            &mut grads[..self.segments],
        ));
        let mut shapes = inputs.iter();
        results.map(|result| {
            let input = shapes.next()?;
            (input.len() > 0).then(|| Array::new(result, &input.dims()))
        })
    }
}

/// DC-AE's multi-scale linear attention (`SanaMultiscaleLinearAttention`): per group of
/// `3 * head_dim` channels, `relu(q)`, `relu(k)` and `v` lie one after the other;
/// `out_i = sum_j v_j (k_j . q_i) / (sum_j k_j . q_i + eps)`.
///
/// `qkv [batch, tokens, groups * 3 * head_dim]` gives `[batch, tokens, groups * head_dim]`.
/// The official code has a linear and, for few tokens, a quadratic form; both are this sum, and the
/// linear one is computed. All in `f32`: half precision smears the normalisation.
pub fn relu_linear_attention(qkv: Tensor<3>, head_dim: usize, eps: f64) -> Tensor<3> {
    if let (Some(qkv), true) = (Handle::of(&qkv), eps as f32 == KERNEL_EPS) {
        return apply(LinearAttentionOp { head_dim }, [qkv]).into_tensor();
    }
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
    (numerator / denominator)
        .swap_dims(1, 2)
        .reshape([b, n, groups * head_dim])
}

/// The epsilon of the official code, which the kernel has built in.
const KERNEL_EPS: f32 = 1e-15;

#[derive(Clone, Copy, Debug)]
struct LinearAttentionOp {
    head_dim: usize,
}

impl LinearAttentionOp {
    fn shape(&self, qkv: &Array) -> LinearAttentionShape {
        let dims = qkv.dims();
        LinearAttentionShape {
            batch: dims[0],
            tokens: dims[1],
            groups: dims[2] / (3 * self.head_dim),
            head_dim: self.head_dim,
        }
    }
}

impl FusedOp<1> for LinearAttentionOp {
    type Saved = ();

    fn forward(&self, [qkv]: &[Array; 1], _: bool) -> (Array, ()) {
        let shape = self.shape(qkv);
        let mut y = vec![0.0; qkv.len() / 3];
        kernel(relu_linear_attention_forward(shape, qkv.data(), &mut y));
        (
            Array::new(
                y,
                &[shape.batch, shape.tokens, shape.groups * shape.head_dim],
            ),
            (),
        )
    }

    fn backward(
        &self,
        [qkv]: &[Array; 1],
        (): &(),
        grad: &Array,
        _: [bool; 1],
    ) -> [Option<Array>; 1] {
        let mut dqkv = vec![0.0; qkv.len()];
        let shape = self.shape(qkv);
        kernel(relu_linear_attention_backward(
            shape,
            qkv.data(),
            grad.data(),
            &mut dqkv,
        ));
        [Some(Array::new(dqkv, &qkv.dims()))]
    }
}
