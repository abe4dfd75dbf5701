//! Softmax attention over one or more token segments, forward and backward.
//!
//! One unit of work is a (sample, group, key head). Its rows are gathered from the segments into
//! scratch that stays in the second-level cache, so neither the joint sequence nor the groups of
//! Alternating Subregion Attention are ever built in memory. Scores are kept in base 2: the factor
//! `scale * log2(e)` is applied to the queries as they are gathered.

mod backward;
mod forward;
mod heads;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod layout;
mod linear;
mod operands;
mod rows;
#[cfg(target_arch = "x86_64")]
mod softmax_x86;
#[cfg(test)]
mod tests;

pub use heads::Rotary;
pub(crate) use heads::{HeadOutput, HeadStream, Heads, MAX_STREAMS};
pub(crate) use linear::linear_attention_columns;
pub use linear::{
    LinearAttentionShape, relu_linear_attention_backward, relu_linear_attention_forward,
};

use self::layout::{Rows, prefetch};
use crate::error::{KernelError, check_eq};
use crate::pool::{Scratch, SharedPtr, num_threads, par_for};
use crate::simd::Level;
use std::ops::Range;

/// Queries, keys and values of one run of tokens, for example the image's or the text's.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// `[batch, tokens, heads * head_dim]`, or empty if the segment's outputs are not needed.
    pub q: &'a [f32],
    /// `[batch, tokens, kv_heads * head_dim]`, or empty (with `v`) if nothing attends to the segment.
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
    /// Tokens per sample.
    pub tokens: usize,
}

/// Where [`attention_backward`] writes the gradients of one [`Segment`]; each slice has the length of
/// the corresponding input.
#[derive(Debug)]
pub struct SegmentGrads<'a> {
    /// Gradient of `q`.
    pub dq: &'a mut [f32],
    /// Gradient of `k`.
    pub dk: &'a mut [f32],
    /// Gradient of `v`.
    pub dv: &'a mut [f32],
}

/// Shape and kind of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionConfig {
    /// Samples.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` uses key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Factor on `q . k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Number of groups that attend separately (1 = all tokens attend to each other). Token
    /// `(l * groups + s) * run + n` of every segment belongs to group `s`; this is the regrouping
    /// `(l s n) -> s (l n)` of Alternating Subregion Attention.
    pub groups: usize,
    /// Consecutive tokens that stay together in a group.
    pub run: usize,
    /// Query `i` sees keys `j <= i` only. Needs one segment with keys and queries, and one group.
    pub causal: bool,
}

impl AttentionConfig {
    /// Full attention of `heads` heads in one group, with the usual scale.
    pub fn joint(batch: usize, heads: usize, head_dim: usize) -> Self {
        Self {
            batch,
            heads,
            kv_heads: heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            groups: 1,
            run: 1,
            causal: false,
        }
    }
}

/// Computes `softmax(scale * q k^T) v` per sample, group and head.
///
/// The joint sequence is the concatenation of the segments in order. `key_mask` (`[batch, total
/// tokens]`, `true` = may be attended) hides keys; a query that sees no key gets zeros. `outs[i]` has
/// the shape of `segments[i].q`. `lse` (`[batch, heads, total tokens]`) receives the logarithm of the
/// sum of exponentials for the backward pass, `-inf` where no key is seen; entries of segments
/// without queries are left as they are.
///
/// # Errors
/// A length that does not follow from the shapes, head counts that do not divide, token counts that
/// `groups * run` does not divide, or causal attention with more than one segment or group.
pub fn attention_forward(
    cfg: &AttentionConfig,
    segments: &[Segment<'_>],
    key_mask: Option<&[bool]>,
    outs: &mut [&mut [f32]],
    lse: &mut [f32],
) -> Result<(), KernelError> {
    forward::run(Level::active(), cfg, segments, key_mask, outs, lse)
}

/// Gradients of [`attention_forward`]: from its inputs, its results `outs` and `lse`, and the
/// gradients `douts` of `outs`, overwrites `grads`.
///
/// # Errors
/// As [`attention_forward`].
pub fn attention_backward(
    cfg: &AttentionConfig,
    segments: &[Segment<'_>],
    key_mask: Option<&[bool]>,
    outs: &[&[f32]],
    lse: &[f32],
    douts: &[&[f32]],
    grads: &mut [SegmentGrads<'_>],
) -> Result<(), KernelError> {
    backward::run(
        Level::active(),
        cfg,
        segments,
        key_mask,
        outs,
        lse,
        douts,
        grads,
    )
}

/// One unit of work.
#[derive(Clone, Copy, Debug)]
struct Unit {
    sample: usize,
    group: usize,
    kv_head: usize,
}

/// A checked problem: who attends to whom, and where everything lies.
struct Problem<'a> {
    cfg: AttentionConfig,
    /// Tokens of every segment.
    lengths: Vec<usize>,
    /// Tokens of all segments.
    total: usize,
    /// Of each segment, the position of its first token in the joint sequence.
    offsets: Vec<usize>,
    /// Per group, the tokens that have queries.
    query_tokens: Vec<Vec<layout::Token>>,
    /// Per group, the tokens that have keys.
    key_tokens: Vec<Vec<layout::Token>>,
    key_mask: Option<&'a [bool]>,
}

impl<'a> Problem<'a> {
    fn new(
        cfg: &AttentionConfig,
        segments: &[Segment<'_>],
        key_mask: Option<&'a [bool]>,
        lse_len: usize,
    ) -> Result<Self, KernelError> {
        let unsupported = |what, value, help| Err(KernelError::Unsupported { what, value, help });
        if cfg.head_dim == 0 || cfg.heads == 0 || cfg.kv_heads == 0 {
            return unsupported(
                "attention heads or head dimension",
                0,
                "give at least one of each",
            );
        }
        if !cfg.heads.is_multiple_of(cfg.kv_heads) {
            return unsupported(
                "attention key heads",
                cfg.kv_heads,
                "it must divide the number of query heads",
            );
        }
        if cfg.groups == 0 || cfg.run == 0 {
            return unsupported(
                "attention groups or run length",
                0,
                "use 1 for plain joint attention",
            );
        }
        if cfg.causal && (segments.len() != 1 || cfg.groups != 1) {
            return unsupported(
                "causal attention segments",
                segments.len(),
                "causal attention takes exactly one segment and one group",
            );
        }
        for segment in segments {
            if !segment.tokens.is_multiple_of(cfg.groups * cfg.run) {
                return unsupported(
                    "attention tokens of a segment",
                    segment.tokens,
                    "groups * run must divide it; pad the segment or use one group",
                );
            }
            let rows = cfg.batch * segment.tokens * cfg.head_dim;
            if !segment.q.is_empty() {
                check_eq("attention query length", rows * cfg.heads, segment.q.len())?;
            }
            if !segment.k.is_empty() {
                check_eq("attention key length", rows * cfg.kv_heads, segment.k.len())?;
            }
            check_eq(
                "attention value length (as the keys')",
                segment.k.len(),
                segment.v.len(),
            )?;
            if cfg.causal {
                check_eq(
                    "causal attention query length",
                    rows * cfg.heads,
                    segment.q.len(),
                )?;
                check_eq(
                    "causal attention key length",
                    rows * cfg.kv_heads,
                    segment.k.len(),
                )?;
            }
        }
        let lengths: Vec<usize> = segments.iter().map(|s| s.tokens).collect();
        let total: usize = lengths.iter().sum();
        check_eq(
            "attention log-sum-exp length",
            cfg.batch * cfg.heads * total,
            lse_len,
        )?;
        if let Some(mask) = key_mask {
            check_eq("attention key mask length", cfg.batch * total, mask.len())?;
        }
        let offsets = lengths
            .iter()
            .scan(0, |at, tokens| {
                *at += tokens;
                Some(*at - tokens)
            })
            .collect();
        let present = |has: &dyn Fn(&Segment<'_>) -> bool| -> Vec<usize> {
            segments
                .iter()
                .map(|s| if has(s) { s.tokens } else { 0 })
                .collect()
        };
        Ok(Self {
            cfg: *cfg,
            total,
            offsets,
            query_tokens: layout::tokens_of_groups(cfg, &present(&|s| !s.q.is_empty())),
            key_tokens: layout::tokens_of_groups(cfg, &present(&|s| !s.k.is_empty())),
            lengths,
            key_mask,
        })
    }

    /// Runs `f(unit, next unit of the same thread)` for one unit per sample, group and key head.
    fn for_units(&self, f: impl Fn(Unit, Option<Unit>) + Sync) {
        let units = self.cfg.batch * self.cfg.groups * self.cfg.kv_heads;
        // Runs of units on one thread, so that it knows what to prefetch; short enough to balance.
        let run = (units / (8 * num_threads())).max(1);
        par_for(units.div_ceil(run), |task| {
            let end = units.min((task + 1) * run);
            for unit in task * run..end {
                let next = (unit + 1 < end).then(|| self.unit(unit + 1));
                f(self.unit(unit), next);
            }
        });
    }

    fn unit(&self, unit: usize) -> Unit {
        let (rest, kv_head) = (unit / self.cfg.kv_heads, unit % self.cfg.kv_heads);
        Unit {
            sample: rest / self.cfg.groups,
            group: rest % self.cfg.groups,
            kv_head,
        }
    }

    /// First rows of a key head in the segments.
    fn key_bases(&self, unit: Unit) -> Vec<usize> {
        let width = self.key_width();
        self.bases(unit.sample, width, unit.kv_head * self.cfg.head_dim)
    }

    /// First rows of the `i`-th query head of a unit in the segments.
    fn query_bases(&self, unit: Unit, i: usize) -> Vec<usize> {
        let head = unit.kv_head * self.heads_per_key() + i;
        self.bases(unit.sample, self.query_width(), head * self.cfg.head_dim)
    }

    fn bases(&self, sample: usize, width: usize, head_at: usize) -> Vec<usize> {
        self.lengths
            .iter()
            .map(|tokens| sample * tokens * width + head_at)
            .collect()
    }

    /// Values per token in k and v.
    fn key_width(&self) -> usize {
        self.cfg.kv_heads * self.cfg.head_dim
    }

    /// Values per token in q.
    fn query_width(&self) -> usize {
        self.cfg.heads * self.cfg.head_dim
    }

    /// Query heads that share a key head.
    fn heads_per_key(&self) -> usize {
        self.cfg.heads / self.cfg.kv_heads
    }

    /// Start of the log-sum-exp row of a sample and head.
    fn lse_row(&self, sample: usize, head: usize) -> usize {
        (sample * self.cfg.heads + head) * self.total
    }

    /// Position of a token in the joint sequence.
    fn position(&self, t: layout::Token) -> usize {
        self.offsets[t.segment as usize] + t.token as usize
    }

    /// The keys that `m` queries from `first` on see, in whole vectors of the padded `width`, and how many
    /// of them the first one sees: under the causal mask a block sees keys up to its last row only.
    fn seen(&self, first: usize, m: usize, lanes: usize, width: usize) -> (usize, usize) {
        match self.cfg.causal {
            true => ((first + m).next_multiple_of(lanes), first + 1),
            false => (width, usize::MAX),
        }
    }

    /// Fills `bias` with 0 for visible keys and `-inf` for hidden ones and the padding.
    fn fill_bias(&self, sample: usize, keys: &[layout::Token], bias: &mut [f32]) {
        let (real, padding) = bias.split_at_mut(keys.len());
        padding.fill(f32::NEG_INFINITY);
        match self.key_mask {
            None => real.fill(0.0),
            Some(mask) => {
                for (bias, &key) in real.iter_mut().zip(keys) {
                    let visible = mask[sample * self.total + self.position(key)];
                    *bias = if visible { 0.0 } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

/// What an attention reads, segment by segment.
struct Inputs<'a> {
    q: Vec<&'a [f32]>,
    k: Vec<&'a [f32]>,
    v: Vec<&'a [f32]>,
}

impl<'a> Inputs<'a> {
    fn of(segments: &[Segment<'a>]) -> Self {
        Self {
            q: segments.iter().map(|s| s.q).collect(),
            k: segments.iter().map(|s| s.k).collect(),
            v: segments.iter().map(|s| s.v).collect(),
        }
    }

    /// Prefetches part of what `unit` will read: the first query head, the same rows of `more`, and the
    /// keys and values.
    fn prefetch(&self, problem: &Problem<'_>, more: &[&[&[f32]]], unit: Unit, part: Range<usize>) {
        let dim = problem.cfg.head_dim;
        let bases = problem.query_bases(unit, 0);
        let rows = Rows {
            tokens: slice_of(&problem.query_tokens[unit.group], &part),
            bases: &bases,
            width: problem.query_width(),
        };
        for source in std::iter::once(self.q.as_slice()).chain(more.iter().copied()) {
            prefetch(&starts(source), &rows, dim);
        }
        let bases = problem.key_bases(unit);
        let rows = Rows {
            tokens: slice_of(&problem.key_tokens[unit.group], &part),
            bases: &bases,
            width: problem.key_width(),
        };
        prefetch(&starts(&self.k), &rows, dim);
        prefetch(&starts(&self.v), &rows, dim);
    }
}

/// Scratch of one unit, handed out piece by piece.
struct Workspace<'a> {
    free: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    fn new(scratch: &'a mut Scratch, len: usize) -> Self {
        // SAFETY: the scratch was taken with at least this many bytes (see `scratch_for`), is
        // aligned, and every bit pattern is a valid f32.
        let free = unsafe { std::slice::from_raw_parts_mut(scratch.as_mut_ptr().cast(), len) };
        Self { free }
    }

    /// The next `len` values, with arbitrary contents; `len` is rounded up to a cache line.
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let free = std::mem::take(&mut self.free);
        let (taken, free) = free.split_at_mut(len.next_multiple_of(16));
        self.free = free;
        &mut taken[..len]
    }
}

/// Values that hold pieces of the given lengths, each rounded up to a cache line.
fn workspace_len(pieces: &[usize]) -> usize {
    pieces.iter().map(|len| len.next_multiple_of(16)).sum()
}

/// Shares the slices between threads.
fn shared(slices: &mut [&mut [f32]]) -> Vec<SharedPtr<f32>> {
    slices
        .iter_mut()
        .map(|slice| SharedPtr(slice.as_mut_ptr()))
        .collect()
}

/// The start of every segment's rows, for prefetching.
fn starts(segments: &[&[f32]]) -> Vec<*const f32> {
    segments.iter().map(|segment| segment.as_ptr()).collect()
}

/// As [`starts`], of what is written.
fn starts_of(segments: &[SharedPtr<f32>]) -> Vec<*const f32> {
    segments
        .iter()
        .map(|segment| segment.get().cast_const())
        .collect()
}

/// The part of `tokens` at `range`, as far as there is one.
fn slice_of<'t>(tokens: &'t [layout::Token], range: &Range<usize>) -> &'t [layout::Token] {
    &tokens[range.start.min(tokens.len())..range.end.min(tokens.len())]
}

/// Query rows of one block: multiples of 24 (which every register tile divides), as many as keep
/// `buffers` blocks of scores in the first-level cache.
fn block_rows(keys: usize, buffers: usize) -> usize {
    let in_cache = 32 * 1024 / size_of::<f32>() / buffers / keys.max(1);
    (in_cache / 24 * 24).clamp(24, 96)
}
