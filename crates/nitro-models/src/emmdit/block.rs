//! One joint block: image and text tokens attend to each other, then pass through their own
//! feed-forward layers, all under AdaLN modulation.

use burn::tensor::Tensor;
use nitro_ops::{
    Activation, Adaln as Modulated, AttentionShape, NormKind, PackedBlock, PackedStream,
    PackedTail, Qkv, gate_residual, joint_attention, layer_norm_modulate, packed_block,
};

use super::config::{Adaln, EmmditConfig};
use crate::layers::{Fan, Linear, RmsNorm};
use crate::{Init, Params, WeightError};

/// Epsilon of a block's first norm (PyTorch's default) and of all others.
const NORM1_EPS: f64 = 1e-5;
pub(super) const EPS: f64 = 1e-6;

/// A joint block. The last block's text stream ends in its attention and has no output.
#[derive(Clone, Debug)]
pub(super) struct Block {
    image: Stream,
    text: Stream,
    attention: AttentionShape,
    head_dim: usize,
}

impl Block {
    /// The block at place `index` of all blocks; `last` has no text output.
    pub(super) fn new(
        config: &EmmditConfig,
        p: &Params<'_>,
        index: usize,
        last: bool,
    ) -> Result<Self, WeightError> {
        let (groups, run) = config.subregions(index);
        Ok(Self {
            image: Stream::new(config, p, &IMAGE, true)?,
            text: Stream::new(config, p, &TEXT, !last)?,
            attention: AttentionShape {
                groups,
                run,
                ..AttentionShape::full(config.heads)
            },
            head_dim: config.head_dim,
        })
    }

    /// `image [B, T, D]`, `text [B, L, D]`, `time [B, 6, D]`: both streams after the block.
    pub(super) fn forward(
        &self,
        image: Tensor<3>,
        text: Tensor<3>,
        time: &Tensor<3>,
    ) -> [Tensor<3>; 2] {
        if let Some(streams) = self.image.packed(time).zip(self.text.packed(time)) {
            return self.forward_packed((image, streams.0), (text, streams.1));
        }
        let image_gates = self.image.modulate(time);
        let text_gates = self.text.modulate(time);
        let image_qkv = self.image.attend(image.clone(), image_gates.as_ref());
        let text_qkv = self.text.attend(text.clone(), text_gates.as_ref());
        let (from_image, from_text) = joint_attention(image_qkv, text_qkv, self.attention);
        [
            self.image.finish(image, from_image, image_gates),
            self.text.finish(text, from_text, text_gates),
        ]
    }

    /// Whether the text stream is changed: the last block's is read only.
    pub(super) fn updates_text(&self) -> bool {
        self.text.tail.is_some()
    }

    /// [`forward`](Self::forward) as one operation, where the weights are packed.
    fn forward_packed(
        &self,
        image: (Tensor<3>, PackedStream<'_>),
        text: (Tensor<3>, PackedStream<'_>),
    ) -> [Tensor<3>; 2] {
        let block = PackedBlock {
            attention: self.attention,
            head_dim: self.head_dim,
            norm: NormKind::Layer,
            eps: [NORM1_EPS, EPS],
            head_eps: EPS,
            activation: Activation::GeluTanh,
            rotary: None,
            key_mask: None,
        };
        packed_block(&block, [image, text])
    }
}

/// The official names of a stream's parts.
struct Names {
    norm1: &'static str,
    qkv: [&'static str; 3],
    norm_q: &'static str,
    norm_k: &'static str,
    out: &'static str,
    feed_forward: &'static str,
    bias: &'static str,
    scale: &'static str,
}

const IMAGE: Names = Names {
    norm1: "norm1",
    qkv: ["attn.to_q", "attn.to_k", "attn.to_v"],
    norm_q: "attn.norm_q",
    norm_k: "attn.norm_k",
    out: "attn.to_out.0",
    feed_forward: "ff",
    bias: "scale_shift_bias",
    scale: "scale_shift_scale",
};

const TEXT: Names = Names {
    norm1: "norm1_context",
    qkv: ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    norm_q: "attn.norm_added_q",
    norm_k: "attn.norm_added_k",
    out: "attn.to_add_out",
    feed_forward: "ff_context",
    bias: "scale_shift_bias_c",
    scale: "scale_shift_scale_c",
};

/// What one kind of token, image or text, passes through.
#[derive(Clone, Debug)]
struct Stream {
    norm1: (Tensor<1>, Tensor<1>),
    qkv: Fan<3>,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    tail: Option<Tail>,
}

/// What follows the attention; absent where nothing reads the stream any more.
#[derive(Clone, Debug)]
struct Tail {
    out: Linear,
    up: Linear,
    down: Linear,
    modulation: Modulation,
}

/// A block's own part of AdaLN.
#[derive(Clone, Debug)]
struct Modulation {
    bias: Tensor<2>,          // [6, D]
    scale: Option<Tensor<2>>, // [6, D]
}

/// Shift, scale and gate of the attention and of the feed-forward branch, each `[B, D]`.
struct Gates {
    attention: Branch,
    feed_forward: Branch,
}

struct Branch {
    shift: Tensor<2>,
    scale: Tensor<2>,
    gate: Tensor<2>,
}

impl Stream {
    fn new(
        config: &EmmditConfig,
        p: &Params<'_>,
        names: &Names,
        has_tail: bool,
    ) -> Result<Self, WeightError> {
        let width = config.width();
        let norm1 = p.sub(names.norm1);
        let rms = |name| RmsNorm::new(&p.sub(name), config.head_dim, EPS);
        Ok(Self {
            norm1: (
                norm1.tensor("weight", [width], Init::Ones)?,
                norm1.tensor("bias", [width], Init::Zeros)?,
            ),
            qkv: Fan::new(names.qkv.map(|name| p.sub(name)), width, [width; 3], true)?,
            norm_q: rms(names.norm_q)?,
            norm_k: rms(names.norm_k)?,
            tail: has_tail.then(|| Tail::new(config, p, names)).transpose()?,
        })
    }

    fn modulate(&self, time: &Tensor<3>) -> Option<Gates> {
        self.tail.as_ref().map(|tail| tail.modulation.forward(time))
    }

    /// This stream's weights, where they are packed.
    fn packed<'a>(&'a self, time: &'a Tensor<3>) -> Option<PackedStream<'a>> {
        let tail = match &self.tail {
            None => None,
            Some(tail) => Some(PackedTail {
                out: tail.out.packed()?,
                norm2: None,
                up: tail.up.packed()?,
                gate: None,
                down: tail.down.packed()?,
            }),
        };
        Some(PackedStream {
            norm1: [Some(&self.norm1.0), Some(&self.norm1.1)],
            modulation: self.tail.as_ref().map(|tail| Modulated {
                time,
                bias: &tail.modulation.bias,
                scale: tail.modulation.scale.as_ref(),
            }),
            qkv: self.qkv.packed()?,
            head_norms: Some([self.norm_q.weight(), self.norm_k.weight()]),
            tail,
        })
    }

    /// Queries, keys and values of the modulated norm of `x [B, T, D]`.
    fn attend(&self, x: Tensor<3>, gates: Option<&Gates>) -> Qkv {
        let modulation = gates.map(|g| (g.attention.scale.clone(), g.attention.shift.clone()));
        let x = layer_norm_modulate(
            x,
            Some((&self.norm1.0, &self.norm1.1)),
            modulation,
            NORM1_EPS,
        );
        let [q, k, v] = self.qkv.forward(&x);
        Qkv {
            q: self.norm_q.forward(q),
            k: self.norm_k.forward(k),
            v,
        }
    }

    /// Adds the attention's output and the feed-forward branch to `x [B, T, D]`; without a tail, `x`.
    fn finish(&self, x: Tensor<3>, attended: Tensor<3>, gates: Option<Gates>) -> Tensor<3> {
        let Some((tail, gates)) = self.tail.as_ref().zip(gates) else {
            return x;
        };
        let Gates {
            attention,
            feed_forward,
        } = gates;
        let x = gate_residual(x, attention.gate, tail.out.forward(attended));
        let modulation = Some((feed_forward.scale, feed_forward.shift));
        let y = layer_norm_modulate(x.clone(), None, modulation, EPS);
        let y = tail.up.forward_with(y, Activation::GeluTanh); // [B, T, 3 D]
        gate_residual(x, feed_forward.gate, tail.down.forward(y))
    }
}

impl Tail {
    fn new(config: &EmmditConfig, p: &Params<'_>, names: &Names) -> Result<Self, WeightError> {
        let width = config.width();
        let hidden = config.feed_forward_width();
        let feed_forward = p.sub(names.feed_forward);
        let init = Init::Normal((width as f64).powf(-0.5));
        let scale = || p.tensor(names.scale, [6, width], init);
        Ok(Self {
            out: Linear::new(&p.sub(names.out), width, width)?,
            up: Linear::new(&feed_forward.sub("net.0.proj"), width, hidden)?,
            down: Linear::new(&feed_forward.sub("net.2"), hidden, width)?,
            modulation: Modulation {
                bias: p.tensor(names.bias, [6, width], init)?,
                scale: (config.adaln == Adaln::Affine).then(scale).transpose()?,
            },
        })
    }
}

impl Modulation {
    /// `bias + time (1 + scale)`, or `bias + time`, over `time [B, 6, D]`.
    fn forward(&self, time: &Tensor<3>) -> Gates {
        let [b, _, width] = time.dims();
        let time = match &self.scale {
            Some(scale) => time.clone() * (scale.clone() + 1.0).unsqueeze::<3>(),
            None => time.clone(),
        };
        let all = time + self.bias.clone().unsqueeze::<3>();
        let part = |i: usize| all.clone().slice_dim(1, i..i + 1).reshape([b, width]);
        Gates {
            attention: Branch {
                shift: part(0),
                scale: part(1),
                gate: part(2),
            },
            feed_forward: Branch {
                shift: part(3),
                scale: part(4),
                gate: part(5),
            },
        }
    }
}
