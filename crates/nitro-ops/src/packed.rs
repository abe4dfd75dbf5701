//! Inference over weights that were packed once: linear layers, and whole transformer blocks.
//!
//! These operations exist on the CPU only and have no gradient; what models compute elsewhere, and in
//! training, are the composed forms, from the same layers with plain weights.

use std::sync::Arc;

use burn::tensor::{Bool, Device, Tensor};
use nitro_kernels::attention::AttentionConfig;
use nitro_kernels::packed::packed_linear;
use nitro_kernels::transformer::{self, BlockConfig, Rotary, transformer_block};

use crate::fused::{Array, Handle};
use crate::linear::kernel;
use crate::{Activation, AttentionShape, profile};

pub use nitro_kernels::packed::{ElementType, PackedBytes, PackedForm, PackedLinear, Rows};
pub use nitro_kernels::transformer::NormKind;

/// Whether tensors of `device` are plain memory that packed operations can read.
pub fn can_pack(device: &Device) -> bool {
    matches!(
        Handle::of(&Tensor::<1>::zeros([1], device)),
        Some(Handle::Plain(_))
    )
}

/// `activation(x W^T + b)` over the last dimension of `x [.., inputs]`.
///
/// A tensor under autodiff gives a constant: no gradient flows through packed weights.
///
/// # Panics
/// If `x` is not an `f32` tensor on the CPU, or its last dimension is not the layer's inputs.
pub fn linear_packed<const D: usize>(
    x: Tensor<D>,
    weight: &PackedLinear,
    activation: Activation,
) -> Tensor<D> {
    let x = host_array(&x);
    let mut dims = x.dims();
    let rows = x.len() / weight.inputs().max(1);
    if let Some(last) = dims.last_mut() {
        *last = weight.outputs();
    }
    let _scope = profile::scope(|| {
        let (inputs, outputs) = (weight.inputs(), weight.outputs());
        let operations = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
        (
            format!("PackedLinear {:?} [{outputs}, {inputs}]", x.dims()),
            operations,
        )
    });
    let mut out = vec![0.0; rows * weight.outputs()];
    kernel(packed_linear(weight, x.data(), activation, &mut out));
    Array::new(out, &dims).into_tensor()
}

/// What all streams of a packed block share; see [`BlockConfig`].
#[derive(Clone, Debug)]
pub struct PackedBlock<'a> {
    /// Heads, subregions and causality.
    pub attention: AttentionShape,
    /// Channels of a head.
    pub head_dim: usize,
    /// The kind of both norms.
    pub norm: NormKind,
    /// Epsilons of the norms before the attention and before the feed-forward layers.
    pub eps: [f64; 2],
    /// Epsilon of the RMS norms of queries and keys.
    pub head_eps: f64,
    /// Of the feed-forward layers.
    pub activation: Activation,
    /// Cosines and sines, `[tokens, head_dim / 2]` each, that rotate queries and keys.
    pub rotary: Option<(&'a [f32], &'a [f32])>,
    /// `[batch, tokens]`, true where a key may be seen.
    pub key_mask: Option<Arc<[bool]>>,
}

/// A stream of a packed block.
#[derive(Debug)]
pub struct PackedStream<'a> {
    /// Gain and offset before the attention, `[width]`.
    pub norm1: [Option<&'a Tensor<1>>; 2],
    /// AdaLN's shift, scale and gate of the attention and of the feed-forward layers.
    pub modulation: Option<Adaln<'a>>,
    /// Queries, keys and values, one after the other.
    pub qkv: &'a PackedLinear,
    /// Weights of the RMS norms of queries and keys, `[head_dim]`.
    pub head_norms: Option<[&'a Tensor<1>; 2]>,
    /// What follows the attention, where anything reads it.
    pub tail: Option<PackedTail<'a>>,
}

/// `bias + time (1 + scale)`, the modulation of AdaLN-affine; without `scale`, `bias + time`.
#[derive(Clone, Copy, Debug)]
pub struct Adaln<'a> {
    /// `[batch, 6, width]`
    pub time: &'a Tensor<3>,
    /// `[6, width]`
    pub bias: &'a Tensor<2>,
    /// `[6, width]`
    pub scale: Option<&'a Tensor<2>>,
}

/// Output projection and feed-forward layers of a [`PackedStream`].
#[derive(Clone, Copy, Debug)]
pub struct PackedTail<'a> {
    /// Output projection.
    pub out: &'a PackedLinear,
    /// Gain before the feed-forward layers, `[width]`.
    pub norm2: Option<&'a Tensor<1>>,
    /// First feed-forward layer.
    pub up: &'a PackedLinear,
    /// Gate of the first layer, if it is a gated unit.
    pub gate: Option<&'a PackedLinear>,
    /// Second feed-forward layer.
    pub down: &'a PackedLinear,
}

/// Runs a block over all its streams at once: each stream's tensor `[batch, tokens, width]` after the
/// block, in the same memory where nobody else holds the tensor. Streams without a tail come back as
/// they are.
///
/// # Panics
/// If a tensor is not `f32` on the CPU, or shapes do not fit the layers.
pub fn packed_block<const N: usize>(
    block: &PackedBlock<'_>,
    streams: [(Tensor<3>, PackedStream<'_>); N],
) -> [Tensor<3>; N] {
    let shapes = streams.each_ref().map(|(x, _)| x.dims());
    let _scope = profile::scope(|| describe(block, &shapes, &streams));
    let hosts = streams.each_ref().map(|(_, stream)| Host::new(stream));
    let batch = shapes.first().map_or(0, |shape| shape[0]);
    let AttentionShape {
        heads,
        kv_heads,
        groups,
        run,
        causal,
    } = block.attention;
    let cfg = BlockConfig {
        attention: AttentionConfig {
            kv_heads,
            groups,
            run,
            causal,
            ..AttentionConfig::joint(batch, heads, block.head_dim)
        },
        norm: block.norm,
        eps: block.eps.map(|eps| eps as f32),
        head_eps: block.head_eps as f32,
        activation: block.activation,
        rotary: block.rotary.map(|(cos, sin)| Rotary { cos, sin }),
        key_mask: block.key_mask.as_deref(),
    };
    let streams = streams.map(|(x, stream)| (owned_array(x), stream));
    let (mut values, streams): (Vec<Array>, Vec<PackedStream<'_>>) = streams.into_iter().unzip();
    let mut views: Vec<transformer::BlockStream<'_>> = streams
        .iter()
        .zip(&hosts)
        .zip(values.iter_mut().zip(shapes))
        .map(|((stream, host), (x, shape))| host.view(stream, shape[1], x.data_mut()))
        .collect();
    kernel(transformer_block(&cfg, &mut views));
    let mut values = values.into_iter().map(Array::into_tensor);
    std::array::from_fn(|_| values.next().expect("one tensor for each stream"))
}

/// Names a block in profiles, with the floating-point operations of its layers and its attention.
fn describe(
    block: &PackedBlock<'_>,
    shapes: &[[usize; 3]],
    streams: &[(Tensor<3>, PackedStream<'_>)],
) -> (String, f64) {
    let layers: f64 = streams
        .iter()
        .map(|(x, stream)| {
            let [batch, tokens, _] = x.dims();
            let tail = stream
                .tail
                .map(|t| [Some(t.out), Some(t.up), t.gate, Some(t.down)]);
            let tail = tail.into_iter().flatten().flatten();
            let weights: usize = tail
                .chain([stream.qkv])
                .map(|layer| layer.inputs() * layer.outputs())
                .sum();
            (batch * tokens * weights) as f64
        })
        .sum();
    let AttentionShape { heads, groups, .. } = block.attention;
    let batch = shapes.first().map_or(0, |shape| shape[0]);
    let tokens: usize = shapes.iter().map(|shape| shape[1]).sum();
    // Products with keys and with values.
    let attention = 2.0 * (batch * heads * block.head_dim * tokens) as f64 * tokens as f64;
    (
        format!("PackedBlock {shapes:?} groups {groups}"),
        2.0 * (layers + attention / groups.max(1) as f64),
    )
}

/// The small parameters of a stream in host memory.
struct Host {
    norm1: [Option<Array>; 2],
    norm2: Option<Array>,
    head_norms: Option<[Array; 2]>,
    modulation: Option<Vec<f32>>,
}

impl Host {
    fn new(stream: &PackedStream<'_>) -> Self {
        Self {
            norm1: stream.norm1.map(|part| part.map(host_array)),
            norm2: stream.tail.and_then(|tail| tail.norm2).map(host_array),
            head_norms: stream.head_norms.map(|norms| norms.map(host_array)),
            modulation: stream.modulation.map(|adaln| adaln.values()),
        }
    }

    fn view<'a>(
        &'a self,
        stream: &'a PackedStream<'_>,
        tokens: usize,
        x: &'a mut [f32],
    ) -> transformer::BlockStream<'a> {
        transformer::BlockStream {
            x,
            tokens,
            norm1: self
                .norm1
                .each_ref()
                .map(|part| part.as_ref().map(Array::data)),
            modulation: self.modulation.as_deref(),
            qkv: stream.qkv,
            head_norms: self.head_norms.as_ref().map(|[q, k]| (q.data(), k.data())),
            tail: stream.tail.map(|tail| transformer::BlockTail {
                out: tail.out,
                norm2: [self.norm2.as_ref().map(Array::data), None],
                up: tail.up,
                gate: tail.gate,
                down: tail.down,
            }),
        }
    }
}

impl Adaln<'_> {
    /// The modulation of every sample, `[batch, 6, width]`.
    fn values(&self) -> Vec<f32> {
        let (time, bias) = (host_array(self.time), host_array(self.bias));
        let scale = self.scale.map(host_array);
        let scale = scale.as_ref().map(Array::data);
        let bias = bias.data();
        let mut values = Vec::with_capacity(time.len());
        for time in time.data().chunks_exact(bias.len().max(1)) {
            let parts = time.iter().zip(bias);
            match scale {
                Some(scale) => values.extend(
                    parts
                        .zip(scale)
                        .map(|((time, bias), scale)| time * (1.0 + scale) + bias),
                ),
                None => values.extend(parts.map(|(time, bias)| time + bias)),
            }
        }
        values
    }
}

/// The truth values of a mask.
pub fn mask_values(mask: Tensor<2, Bool>) -> Arc<[bool]> {
    mask.into_data().iter::<bool>().collect()
}

pub(crate) fn host_array<const D: usize>(x: &Tensor<D>) -> Array {
    owned_array(x.clone())
}

fn owned_array<const D: usize>(x: Tensor<D>) -> Array {
    match Handle::from_tensor(x).map(Handle::into_array) {
        Some(array) => array,
        None => panic!("packed weights need f32 tensors on the CPU"),
    }
}
