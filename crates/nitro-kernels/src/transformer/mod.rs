//! A whole transformer block in one parallel region, for inference.
//!
//! The block of E-MMDiT (two streams of tokens that attend to each other, AdaLN modulation, GELU) and
//! that of Llama (one stream, RMS norm, rotary positions, causal grouped-query attention, SwiGLU) are
//! the same eight phases: normalise, project to queries, keys and values, attend, project and add,
//! normalise, widen, (quantise), narrow and add. Each phase is a list of tasks over all streams that
//! threads take in order ([`crate::pool::par_phases`]), so that a block costs one fork and join.
//!
//! Between phases activations lie in the form the next product reads (bf16 where that is the
//! precision), which the epilogue of the product before writes; only the residual streams are f32 in
//! memory throughout. Integers need a row's largest value before its elements, so with
//! [`Precision::Int8`](crate::isa::Precision::Int8) rows pass through f32 and one more phase.

pub mod phases;
mod run;
#[cfg(test)]
mod tests;

use crate::attention::{AttentionConfig, MAX_STREAMS};
use crate::error::{KernelError, check_eq};
use crate::gemm::Activation;
use crate::packed::PackedLinear;

pub use crate::attention::Rotary;
pub use run::transformer_block;

/// How a block normalises its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// Mean and variance.
    Layer,
    /// Root mean square.
    Rms,
}

/// What all streams of a block share.
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig<'a> {
    /// Batch, heads, subregion groups and causality. `scale` is the factor on `q . k`.
    pub attention: AttentionConfig,
    /// The kind of both norms.
    pub norm: NormKind,
    /// Epsilons of the norms before the attention and before the feed-forward layers.
    pub eps: [f32; 2],
    /// Epsilon of the RMS norms of queries and keys.
    pub head_eps: f32,
    /// Of the feed-forward layers; with a gate, applied to the gate.
    pub activation: Activation,
    /// Rotates queries and keys.
    pub rotary: Option<Rotary<'a>>,
    /// `[batch, tokens]`, true where a key may be seen; blocks of one stream only.
    pub key_mask: Option<&'a [bool]>,
}

/// A stream of tokens and its weights.
#[derive(Debug)]
pub struct BlockStream<'a> {
    /// The residual stream, `[batch, tokens, width]`; the block adds to it.
    pub x: &'a mut [f32],
    /// Tokens per sample.
    pub tokens: usize,
    /// Gain and offset of the norm before the attention, `[width]` each; 1 and 0 where absent.
    pub norm1: [Option<&'a [f32]>; 2],
    /// AdaLN's `[batch, 6, width]`: shift, scale and gate of the attention, then of the feed-forward
    /// layers.
    pub modulation: Option<&'a [f32]>,
    /// Queries, keys and values, one after the other.
    pub qkv: &'a PackedLinear,
    /// Weights of the RMS norms of queries and keys, `[head_dim]` each.
    pub head_norms: Option<(&'a [f32], &'a [f32])>,
    /// What follows the attention; absent where nothing reads the stream any more.
    pub tail: Option<BlockTail<'a>>,
}

/// The part of a stream after the attention.
#[derive(Clone, Copy, Debug)]
pub struct BlockTail<'a> {
    /// Output projection of the attention.
    pub out: &'a PackedLinear,
    /// Gain and offset of the norm before the feed-forward layers.
    pub norm2: [Option<&'a [f32]>; 2],
    /// First feed-forward layer.
    pub up: &'a PackedLinear,
    /// The gate of a gated unit: `activation(gate(x)) * up(x)`.
    pub gate: Option<&'a PackedLinear>,
    /// Second feed-forward layer.
    pub down: &'a PackedLinear,
}

/// Checks that everything fits together; the width of the streams.
fn check(cfg: &BlockConfig<'_>, streams: &[BlockStream<'_>]) -> Result<usize, KernelError> {
    let AttentionConfig {
        batch,
        heads,
        kv_heads,
        head_dim,
        groups,
        run,
        causal,
        ..
    } = cfg.attention;
    let refuse = |what, value, help| Err(KernelError::Unsupported { what, value, help });
    if head_dim == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return refuse(
            "block key heads",
            kv_heads,
            "they must divide the query heads",
        );
    }
    if groups == 0 || run == 0 {
        return refuse("block groups or run", 0, "use 1 for plain attention");
    }
    if streams.len() != 1 && (causal || cfg.key_mask.is_some() || cfg.rotary.is_some()) {
        return refuse(
            "block streams with a causal or key mask, or rotary positions",
            streams.len(),
            "these need one stream",
        );
    }
    if causal && groups != 1 {
        return refuse("causal block groups", groups, "use one group");
    }
    if streams.len() > MAX_STREAMS {
        return refuse("block streams", streams.len(), "give at most two");
    }
    let Some(first) = streams.first() else {
        return refuse("block streams", 0, "give at least one");
    };
    let width = first.qkv.inputs();
    for stream in streams {
        let rows = batch * stream.tokens;
        if !stream.tokens.is_multiple_of(groups * run) {
            return refuse(
                "block tokens",
                stream.tokens,
                "groups times run must divide them",
            );
        }
        check_eq("block stream length", rows * width, stream.x.len())?;
        let qkv_width = (heads + 2 * kv_heads) * head_dim;
        check_layer(stream.qkv, first.qkv, true, [width, qkv_width])?;
        check_norm(stream.norm1, width)?;
        if let Some(modulation) = stream.modulation {
            check_eq(
                "block modulation length",
                batch * 6 * width,
                modulation.len(),
            )?;
        }
        if let Some((q, k)) = stream.head_norms {
            check_eq("query norm length", head_dim, q.len())?;
            check_eq("key norm length", head_dim, k.len())?;
        }
        if let Some(tail) = &stream.tail {
            check_norm(tail.norm2, width)?;
            check_layer(tail.out, first.qkv, false, [heads * head_dim, width])?;
            let hidden = tail.up.outputs();
            check_layer(tail.up, first.qkv, true, [width, hidden])?;
            check_layer(tail.down, first.qkv, false, [hidden, width])?;
            if let Some(gate) = tail.gate {
                check_layer(gate, first.qkv, true, [width, hidden])?;
            }
        }
        if let Some(rotary) = &cfg.rotary {
            check_eq(
                "rotary table length",
                stream.tokens * (head_dim / 2),
                rotary.cos.len(),
            )?;
            check_eq("rotary table length", rotary.cos.len(), rotary.sin.len())?;
        }
        if let Some(mask) = cfg.key_mask {
            check_eq("block key mask length", rows, mask.len())?;
        }
    }
    Ok(width)
}

/// Checks a layer's shape, and that its activations are those of the block's first layer: of the same
/// float format, and `same_format` where both read one buffer. So output projections may be bf16 in a
/// block of integers.
fn check_layer(
    layer: &PackedLinear,
    like: &PackedLinear,
    same_format: bool,
    [inputs, outputs]: [usize; 2],
) -> Result<(), KernelError> {
    check_eq("inputs of a block's layer", inputs, layer.inputs())?;
    check_eq("outputs of a block's layer", outputs, layer.outputs())?;
    if !layer.is_packed_like(like) || (same_format && layer.format() != like.format()) {
        return Err(KernelError::Unsupported {
            what: "layer of a block packed in another precision; layer outputs",
            value: layer.outputs(),
            help: "pack all layers of a block alike",
        });
    }
    Ok(())
}

fn check_norm(norm: [Option<&[f32]>; 2], width: usize) -> Result<(), KernelError> {
    for part in norm.into_iter().flatten() {
        check_eq("norm parameters", width, part.len())?;
    }
    Ok(())
}
