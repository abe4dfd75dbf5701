//! Softmax attention of a transformer block whose queries, keys and values lie in one buffer per
//! stream, for inference.
//!
//! A unit of work is a (sample, group, key head), as in [`super::attention_forward`]. Differences:
//! products run in the block's precision (bf16 where asked for), rows are normalised and rotated as
//! they are gathered, and the result is written as the input of the output projection.

#[cfg(target_arch = "x86_64")]
use super::lanes_x86 as lanes;
use super::layout::{Token, tokens_of_groups};
use super::operands::{
    Source, gather_heads, pack_columns, pack_row, pack_values, row_units, value_panel,
};
use super::rows::softmax_rows;
#[cfg(target_arch = "x86_64")]
use super::softmax_x86::probabilities;
use super::{AttentionConfig, Workspace, block_rows, workspace_len};
#[cfg(target_arch = "x86_64")]
use crate::gemm::{Interleave, Unit, convert_run, interleave_rows};
use crate::gemm::{KernelSet, LANES};
#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::packed::{Activations, Format, PanelFn, PanelTile, TILE_ROWS, kernel};
use crate::pool::{Scratch, SharedPtr};
use crate::simd::Level;
use std::f32::consts::LOG2_E;

/// One stream of tokens.
pub(crate) struct HeadStream<'a> {
    /// Queries of all heads, then keys, then values.
    pub(crate) qkv: SharedPtr<f32>,
    /// Values between tokens, and between heads.
    pub(crate) pitch: usize,
    pub(crate) head_pitch: usize,
    pub(crate) tokens: usize,
    /// RMS norm of each head's queries and keys: weights of one head.
    pub(crate) norms: Option<(&'a [f32], &'a [f32])>,
    /// Where the heads' outputs go; nowhere if nothing reads them.
    pub(crate) out: HeadOutput<'a>,
}

/// Where a stream's outputs go.
pub(crate) enum HeadOutput<'a> {
    Nowhere,
    /// The input of a product, of the attention's own float format.
    Pack(&'a Activations),
    /// `[batch, tokens, heads * head_dim]`
    Store(SharedPtr<f32>),
}

/// Rotary position embedding: cosines and sines `[tokens, head_dim / 2]`.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// The attention of a block, cut into units.
pub(crate) struct Heads<'a> {
    set: KernelSet,
    level: Level,
    kernel: PanelFn,
    cfg: AttentionConfig,
    streams: &'a [HeadStream<'a>],
    norm_eps: f32,
    rotary: Option<Rotary<'a>>,
    /// `[batch, tokens]` of the only stream: true where a key may be seen.
    key_mask: Option<&'a [bool]>,
    /// Tokens of each group, over all streams; and those whose output is wanted.
    keys: Vec<Vec<Token>>,
    queries: Vec<Vec<Token>>,
    /// Scores cannot leave the range of `2^x`, so that a softmax need not look for their maximum.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(
            dead_code,
            reason = "only the kernel for x86 has a softmax without maximum"
        )
    )]
    bounded: bool,
}

/// The most streams.
pub(crate) const MAX_STREAMS: usize = 2;

/// Base-2 scores up to this magnitude, and sums of as many probabilities as there are keys, are well
/// inside the range of f32.
const BOUND: f32 = 64.0;

impl<'a> Heads<'a> {
    pub(crate) fn new(
        set: &KernelSet,
        cfg: AttentionConfig,
        streams: &'a [HeadStream<'a>],
        norm_eps: f32,
        rotary: Option<Rotary<'a>>,
        key_mask: Option<&'a [bool]>,
    ) -> Self {
        let count = |wanted: bool| -> Vec<Vec<Token>> {
            let tokens: Vec<usize> = streams
                .iter()
                .map(|stream| match stream.out {
                    HeadOutput::Nowhere if wanted => 0,
                    _ => stream.tokens,
                })
                .collect();
            tokens_of_groups(&cfg, &tokens)
        };
        Heads {
            set: *set,
            level: Level::of(set.isa),
            kernel: kernel(set, Format::Float),
            bounded: largest_score(&cfg, streams).is_some_and(|score| score <= BOUND),
            keys: count(false),
            queries: count(true),
            cfg,
            streams,
            norm_eps,
            rotary,
            key_mask,
        }
    }

    pub(crate) fn units(&self) -> usize {
        self.cfg.batch * self.cfg.groups * self.cfg.kv_heads
    }

    /// First value of a head's rows in each stream; `at` counts heads from the first query head.
    fn source(&self, sample: usize, at: usize, part: Part) -> Source<'a> {
        let mut source = Source {
            rows: [std::ptr::null(); MAX_STREAMS],
            pitches: [0; MAX_STREAMS],
            norms: [None; MAX_STREAMS],
        };
        for (i, stream) in self.streams.iter().enumerate() {
            let first = sample * stream.tokens * stream.pitch + at * stream.head_pitch;
            source.rows[i] = stream.qkv.get().wrapping_add(first);
            source.pitches[i] = stream.pitch;
            source.norms[i] = match (stream.norms, part) {
                (Some((query, _)), Part::Queries) => Some(query),
                (Some((_, key)), Part::Keys) => Some(key),
                _ => None,
            };
        }
        source
    }

    /// Runs one unit.
    ///
    /// # Safety
    /// The streams' buffers must hold all samples and tokens, complete, and nobody else may write
    /// them or access the outputs of this unit's heads.
    pub(crate) unsafe fn run(&self, unit: usize) {
        let (set, cfg) = (&self.set, &self.cfg);
        let (rest, kv_head) = (unit / cfg.kv_heads, unit % cfg.kv_heads);
        let (sample, group) = (rest / cfg.groups, rest % cfg.groups);
        let (keys, queries) = (&self.keys[group], &self.queries[group]);
        if keys.is_empty() || queries.is_empty() {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if self.fits_lanes() {
            // SAFETY: the caller's contract; kernel sets exist only for supported instruction sets.
            unsafe { self.run_lanes(sample, kv_head, keys, queries) };
            return;
        }
        let (dim, depth) = (cfg.head_dim, set.unit.depth());
        let padded = dim.next_multiple_of(LANES);
        let columns = keys.len().next_multiple_of(LANES);
        let block = block_rows(columns, 1).min(queries.len());
        let value_units = keys.len().div_ceil(depth);
        let sizes = [
            columns * padded,                  // rows of keys, then of values
            columns * padded.div_ceil(depth),  // packed keys
            value_units * padded,              // packed values
            columns,                           // bias
            block * padded,                    // queries, then outputs
            block * row_units(padded, depth),  // packed queries
            block * columns,                   // scores
            block * row_units(columns, depth), // packed probabilities
            block,
            block,
        ];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * 4);
        let mut workspace = Workspace::new(&mut scratch, len);
        let [
            rows,
            packed_keys,
            packed_values,
            bias,
            query,
            packed_query,
            scores,
            probabilities,
            max,
            sum,
        ] = sizes.map(|n| workspace.take(n));

        let gather = |tokens: &[Token], at: usize, part: Part, to: &mut [f32]| {
            // SAFETY: the caller vouches for the streams.
            unsafe { self.gather(sample, tokens, at, part, to, padded) };
        };
        gather(keys, cfg.heads + kv_head, Part::Keys, rows);
        pack_columns(set, rows, keys.len(), dim, padded, packed_keys);
        let values_at = cfg.heads + cfg.kv_heads + kv_head;
        gather(keys, values_at, Part::Values, rows);
        pack_values(set, rows, keys.len(), padded, packed_values);
        let bias = self.key_mask.map(|mask| {
            fill_bias(&mask[sample * self.streams[0].tokens..], keys, bias);
            &*bias
        });

        let heads_per_key = cfg.heads / cfg.kv_heads;
        let query_pitch = row_units(padded, depth) * 4;
        let probability_pitch = row_units(columns, depth) * 4;
        for head in kv_head * heads_per_key..(kv_head + 1) * heads_per_key {
            for first in (0..queries.len()).step_by(block) {
                let tokens = &queries[first..queries.len().min(first + block)];
                let m = tokens.len();
                gather(tokens, head, Part::Queries, query);
                let base: *mut u8 = packed_query.as_mut_ptr().cast();
                for (i, row) in query.chunks_exact(padded).take(m).enumerate() {
                    // SAFETY: each row of the buffer holds `dim` elements, padded to whole units.
                    unsafe { pack_row(set, &row[..dim], base.add(i * query_pitch)) };
                }
                // Under the causal mask the block sees keys up to its last row only (and whole panels).
                let (seen, first_limit) = if cfg.causal {
                    let panel = set.vectors * LANES;
                    ((first + m).next_multiple_of(panel).min(columns), first + 1)
                } else {
                    (columns, keys.len())
                };
                let left = Left {
                    base,
                    pitch: query_pitch,
                    rows: m,
                    units: dim.div_ceil(depth),
                };
                // SAFETY: the operands were packed above with these extents; `scores` holds `m` rows.
                unsafe {
                    let b = packed_keys.as_ptr().cast();
                    let width = set.vectors * LANES;
                    let stride = width * left.units;
                    self.multiply(&left, b, (seen, width, stride), scores.as_mut_ptr());
                }
                let terms = seen.min(keys.len());
                let limit = |i: usize| match cfg.causal {
                    true => (first_limit + i).min(terms),
                    false => terms,
                };
                let base: *mut u8 = probabilities.as_mut_ptr().cast();
                let out = Probabilities {
                    base,
                    pitch: probability_pitch,
                    terms,
                };
                let scores = &mut scores[..m * seen];
                // SAFETY: each row of the buffer holds `columns` elements.
                unsafe { self.softmax(scores, seen, limit, bias, &out, max, sum) };
                let left = Left {
                    base,
                    pitch: probability_pitch,
                    rows: m,
                    units: terms.div_ceil(depth),
                };
                // SAFETY: as above; the queries are used up, their scratch takes the output.
                unsafe {
                    let width = value_panel(set, padded) * LANES;
                    let b = packed_values.as_ptr().cast();
                    let shape = (padded, width, value_units * width);
                    self.multiply(&left, b, shape, query.as_mut_ptr());
                }
                for (i, row) in query.chunks_exact_mut(padded).take(m).enumerate() {
                    let factor = if sum[i] == 0.0 { 0.0 } else { 1.0 / sum[i] };
                    row.iter_mut().for_each(|x| *x *= factor);
                    // SAFETY: the caller's contract.
                    unsafe { self.write(sample, tokens[i], head, &row[..dim]) };
                }
            }
        }
    }

    /// Copies a head's rows to consecutive rows of `padded` values, normalised, rotated, and queries
    /// scaled for base-2 exponentials.
    ///
    /// # Safety
    /// As [`Heads::run`].
    unsafe fn gather(
        &self,
        sample: usize,
        tokens: &[Token],
        at: usize,
        part: Part,
        to: &mut [f32],
        padded: usize,
    ) {
        let factor = match part {
            Part::Queries => self.cfg.scale * LOG2_E,
            Part::Keys | Part::Values => 1.0,
        };
        // SAFETY: the caller vouches for the streams.
        unsafe {
            gather_heads(
                self.level,
                &self.source(sample, at, part),
                tokens,
                self.cfg.head_dim,
                self.norm_eps,
                self.rotary.filter(|_| part != Part::Values),
                factor,
                to,
                padded,
            );
        }
    }

    /// Whether [`Heads::run_lanes`] computes these heads.
    #[cfg(target_arch = "x86_64")]
    fn fits_lanes(&self) -> bool {
        let (mut packed, mut stored) = (false, false);
        for stream in self.streams {
            packed |= matches!(stream.out, HeadOutput::Pack(_));
            stored |= matches!(stream.out, HeadOutput::Store(_));
        }
        !(packed && stored)
            && self.set.unit == Unit::Bf16Pair
            && self.set.isa == Isa::Avx512Bf16
            && self.key_mask.is_none()
            && !self.cfg.causal
            && self.cfg.head_dim.is_multiple_of(32)
    }

    /// A unit with queries in lanes.
    ///
    /// # Safety
    /// As [`Heads::run`], and heads must fit.
    #[cfg(target_arch = "x86_64")]
    unsafe fn run_lanes(&self, sample: usize, kv_head: usize, keys: &[Token], queries: &[Token]) {
        let (set, cfg) = (&self.set, &self.cfg);
        let (dim, units) = (cfg.head_dim, cfg.head_dim / 2);
        let pitch = queries.len().next_multiple_of(LANES);
        let sizes = [
            keys.len().max(queries.len()) * dim,
            keys.len().max(queries.len()) * units,
            keys.len() * units,
            keys.len().div_ceil(2) * dim,
            units * pitch,
            lanes::probabilities_len(keys.len()),
            lanes::outputs_len(dim),
        ];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * 4);
        let mut workspace = Workspace::new(&mut scratch, len);
        let [
            rows,
            row_pairs,
            packed_keys,
            packed_values,
            packed_queries,
            probabilities,
            outputs,
        ] = sizes.map(|n| workspace.take(n));
        let gather = |tokens: &[Token], at: usize, part: Part, to: &mut [f32]| {
            // SAFETY: the caller vouches for the streams.
            unsafe { self.gather(sample, tokens, at, part, to, dim) };
        };
        gather(keys, cfg.heads + kv_head, Part::Keys, rows);
        let values = keys.len() * dim;
        // SAFETY: pairs take half the room.
        unsafe { convert_run(set, &rows[..values], packed_keys.as_mut_ptr().cast()) };
        gather(keys, cfg.heads + cfg.kv_heads + kv_head, Part::Values, rows);
        let shape = Interleave {
            rows: keys.len(),
            stride: dim,
            count: dim,
            unit_pitch: dim,
            chunk: LANES,
            chunk_pitch: LANES,
        };
        // SAFETY: rows and pairs have these sizes.
        unsafe { interleave_rows(set, shape, rows.as_ptr(), packed_values.as_mut_ptr().cast()) };
        let heads_per_key = cfg.heads / cfg.kv_heads;
        for head in kv_head * heads_per_key..(kv_head + 1) * heads_per_key {
            gather(queries, head, Part::Queries, rows);
            let values = queries.len() * dim;
            // SAFETY: pairs take half the room; columns are whole vectors.
            unsafe {
                convert_run(set, &rows[..values], row_pairs.as_mut_ptr().cast());
                let (from, to) = (
                    row_pairs.as_ptr().cast(),
                    packed_queries.as_mut_ptr().cast(),
                );
                lanes::columns_of(set, from, queries.len(), units, to, pitch);
            }
            let operands = lanes::Head {
                keys: keys.len(),
                queries: queries.len(),
                dim,
                bounded: self.bounded,
                packed_keys: packed_keys.as_ptr().cast(),
                packed_values: packed_values.as_ptr().cast(),
                packed_queries: packed_queries.as_ptr().cast(),
                probabilities: probabilities.as_mut_ptr().cast(),
                outputs: outputs.as_mut_ptr().cast(),
            };
            let at = head * dim;
            let place = |query: usize| {
                let token = queries[query];
                let stream = &self.streams[token.segment as usize];
                let row = sample * stream.tokens + token.token as usize;
                match &stream.out {
                    HeadOutput::Nowhere => std::ptr::null_mut(),
                    HeadOutput::Pack(to) => to.row(row).wrapping_add(at * 2),
                    HeadOutput::Store(to) => {
                        let row = row * cfg.heads * dim;
                        to.get().wrapping_add(row + at).cast()
                    }
                }
            };
            let form = match self.streams[queries[0].segment as usize].out {
                HeadOutput::Store(_) => lanes::Form::Single,
                HeadOutput::Pack(_) | HeadOutput::Nowhere => lanes::Form::Pairs,
            };
            // SAFETY: the operands were made above; queries whose output nobody wants are not listed,
            // and the caller vouches for the outputs.
            unsafe { operands.run(set, form, place) };
        }
    }

    /// `c[row, column] = sum over units of left b` for `columns` columns (whole vectors) in panels of
    /// `width` columns, `stride` units of memory apart.
    ///
    /// # Safety
    /// The operands must hold these extents, and `c` rows of `columns` values.
    unsafe fn multiply(
        &self,
        left: &Left,
        b: *const u32,
        (columns, width, stride): (usize, usize, usize),
        c: *mut f32,
    ) {
        for (panel, column) in (0..columns).step_by(width).enumerate() {
            let b = b.wrapping_add(panel * stride);
            for first in (0..left.rows).step_by(TILE_ROWS) {
                let tile = PanelTile {
                    a: left.base.wrapping_add(first * left.pitch),
                    pitch: left.pitch,
                    rows: TILE_ROWS.min(left.rows - first),
                    b,
                    units: left.units,
                    vectors: (columns - column).min(width) / LANES,
                    start: std::ptr::null(),
                    c: c.wrapping_add(first * columns + column),
                    c_pitch: columns,
                    accumulate: false,
                    prefetch: b.cast(),
                    prefetch_step: 0,
                };
                // SAFETY: the caller's contract.
                unsafe { (self.kernel)(&self.set, &tile) };
            }
        }
    }

    /// Rows of base-2 scores, `seen` values each of which row `i` sees the first `limit(i)`, to
    /// probabilities in the form of a product's rows, and their sums.
    ///
    /// # Safety
    /// `out` must have a row of `out.terms` elements, to whole vectors of any width, for each of
    /// `scores`.
    unsafe fn softmax(
        &self,
        scores: &mut [f32],
        seen: usize,
        limit: impl Fn(usize) -> usize,
        bias: Option<&[f32]>,
        out: &Probabilities,
        max: &mut [f32],
        sum: &mut [f32],
    ) {
        let rows = scores.len() / seen;
        if let Some(bias) = bias {
            for row in scores.chunks_exact_mut(seen) {
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if self.set.unit == Unit::Bf16Pair && self.set.isa == Isa::Avx512Bf16 {
            // A hidden key's score is -inf: its place in the row is found by the maximum.
            let bounded = self.bounded && bias.is_none();
            for (i, row) in scores.chunks_exact(seen).enumerate() {
                // SAFETY: rows are whole vectors; the caller vouches for `out`; kernel sets exist only
                // for supported instruction sets.
                sum[i] = unsafe {
                    let to = out.base.add(i * out.pitch).cast();
                    probabilities(row.as_ptr(), limit(i), out.terms, bounded, to)
                };
            }
            return;
        }
        for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
            row[limit(i)..].fill(f32::NEG_INFINITY);
        }
        softmax_rows(
            self.level,
            scores,
            seen,
            usize::MAX,
            &mut max[..rows],
            &mut sum[..rows],
        );
        for (i, row) in scores.chunks_exact(seen).enumerate() {
            // SAFETY: the caller vouches for `out`.
            unsafe { pack_row(&self.set, &row[..out.terms], out.base.add(i * out.pitch)) };
        }
    }

    /// # Safety
    /// As [`Heads::run`].
    unsafe fn write(&self, sample: usize, token: Token, head: usize, values: &[f32]) {
        let stream = &self.streams[token.segment as usize];
        let row = sample * stream.tokens + token.token as usize;
        let at = head * self.cfg.head_dim;
        match &stream.out {
            HeadOutput::Nowhere => {}
            // SAFETY: the caller vouches for the outputs.
            HeadOutput::Pack(to) => unsafe { to.write_part(row, at, values) },
            HeadOutput::Store(to) => {
                let width = self.cfg.heads * self.cfg.head_dim;
                // SAFETY: as above.
                unsafe {
                    let to = to.get().add(row * width + at);
                    std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
                }
            }
        }
    }
}

/// The largest base-2 score that normalised queries and keys can have: a head's rows have the norm
/// `sqrt(head_dim)` before their weights, and rotation keeps it.
fn largest_score(cfg: &AttentionConfig, streams: &[HeadStream<'_>]) -> Option<f32> {
    let largest = |weight: &[f32]| weight.iter().fold(0.0_f32, |a, w| a.max(w.abs()));
    let (mut query, mut key) = (0.0_f32, 0.0_f32);
    for stream in streams {
        let (queries, keys) = stream.norms?;
        query = query.max(largest(queries));
        key = key.max(largest(keys));
    }
    Some(query * key * cfg.head_dim as f32 * cfg.scale.abs() * LOG2_E)
}

/// What a head's rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Queries,
    Keys,
    Values,
}

/// Where probabilities go.
struct Probabilities {
    base: *mut u8,
    /// Bytes between rows.
    pitch: usize,
    /// Elements of a row.
    terms: usize,
}

/// 0 for the keys that `mask` lets through, `-inf` for the others and the padding.
fn fill_bias(mask: &[bool], keys: &[Token], bias: &mut [f32]) {
    bias.fill(f32::NEG_INFINITY);
    for (bias, key) in bias.iter_mut().zip(keys) {
        if mask[key.token as usize] {
            *bias = 0.0;
        }
    }
}

/// Packed rows.
struct Left {
    base: *const u8,
    pitch: usize,
    rows: usize,
    units: usize,
}
