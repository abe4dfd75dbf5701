//! The operands of a head's two products: rows gathered from the streams, and packed.

use super::Rotary;
use super::heads::MAX_STREAMS;
use super::layout::Token;
use crate::gemm::{Interleave, KernelSet, LANES, convert_run, interleave_rows, transpose16};
use crate::simd::{Level, prefetch_line, simd_kernel};

/// Units of a packed row, and a cache line more so that rows do not share cache sets.
pub(super) fn row_units(elements: usize, depth: usize) -> usize {
    elements.div_ceil(depth).next_multiple_of(LANES) + LANES
}

/// Writes a row's elements and zeros up to a whole unit.
///
/// # Safety
/// `to` must have room for the units.
pub(super) unsafe fn pack_row(set: &KernelSet, row: &[f32], to: *mut u8) {
    let depth = set.unit.depth();
    // SAFETY: the caller vouches for the units.
    unsafe {
        if !row.len().is_multiple_of(depth) {
            to.cast::<u32>().add(row.len() / depth).write_unaligned(0);
        }
        convert_run(set, row, to);
    }
}

/// Packs `count` rows of `dim` values as the columns of an operand, `[panel][unit][width]`.
pub(super) fn pack_columns(
    set: &KernelSet,
    rows: &[f32],
    count: usize,
    dim: usize,
    padded: usize,
    to: &mut [f32],
) {
    let depth = set.unit.depth();
    let units = dim.div_ceil(depth);
    let vectors = count.div_ceil(LANES);
    assert!(to.len() >= vectors * LANES * units && rows.len() >= count * padded);
    let to: *mut u32 = to.as_mut_ptr().cast();
    let mut square = [0_u32; LANES * LANES];
    for vector in 0..vectors {
        let panel = vector / set.vectors;
        let width = (vectors - panel * set.vectors).min(set.vectors) * LANES;
        let start = panel * set.vectors * LANES * units + vector % set.vectors * LANES;
        let lanes = (count - vector * LANES).min(LANES);
        for unit in (0..units).step_by(LANES) {
            let element = unit * depth;
            let elements = (dim - element).min(LANES * depth);
            if lanes < LANES || elements < LANES * depth {
                square.fill(0);
            }
            for lane in 0..lanes {
                let row = &rows[(vector * LANES + lane) * padded + element..][..elements];
                // SAFETY: a row of the square holds sixteen units.
                unsafe { convert_run(set, row, square.as_mut_ptr().add(lane * LANES).cast()) };
            }
            // SAFETY: inside the panel, by the assertion above.
            unsafe {
                let to = to.add(start + unit * width);
                transpose16(set, square.as_ptr(), to, width, (units - unit).min(LANES));
            }
        }
    }
}

/// Vectors of a panel of values: a head's width in equal panels.
pub(super) fn value_panel(set: &KernelSet, padded: usize) -> usize {
    let vectors = padded / LANES;
    let wanted = if vectors.is_multiple_of(3) { 3 } else { 2 };
    wanted.min(set.vectors).min(vectors)
}

/// Packs `count` rows of `padded` values as the rows of an operand, `[panel][unit][width]`.
pub(super) fn pack_values(
    set: &KernelSet,
    rows: &[f32],
    count: usize,
    padded: usize,
    to: &mut [f32],
) {
    let units = count.div_ceil(set.unit.depth());
    let vectors = value_panel(set, padded);
    assert!(to.len() >= units * padded && rows.len() >= count * padded);
    for column in (0..padded).step_by(vectors * LANES) {
        let width = (padded - column).min(vectors * LANES);
        let shape = Interleave {
            rows: count,
            stride: padded,
            count: width,
            unit_pitch: width,
            chunk: LANES,
            chunk_pitch: LANES,
        };
        // SAFETY: rows and panels lie inside the buffers, by the assertion above.
        unsafe {
            let to = to.as_mut_ptr().cast::<u32>().add(column * units);
            interleave_rows(set, shape, rows.as_ptr().add(column), to);
        }
    }
}

/// Rows that are fetched ahead while gathering.
const AHEAD: usize = 12;

/// Where the rows of a head begin in each stream.
pub(super) struct Source<'a> {
    pub(super) rows: [*const f32; MAX_STREAMS],
    /// Values between rows.
    pub(super) pitches: [usize; MAX_STREAMS],
    pub(super) norms: [Option<&'a [f32]>; MAX_STREAMS],
}

/// Copies a head's rows to consecutive rows of `padded` values, normalised, rotated and times `factor`;
/// the padding becomes zero.
///
/// # Safety
/// The source must hold the rows of all `tokens`, which nobody writes meanwhile.
pub(super) unsafe fn gather_heads(
    level: Level,
    source: &Source<'_>,
    tokens: &[Token],
    dim: usize,
    eps: f32,
    rotary: Option<Rotary<'_>>,
    factor: f32,
    dst: &mut [f32],
    padded: usize,
) {
    gather_raw(level, source, tokens, dim, eps, rotary, factor, dst, padded);
}

simd_kernel! {
    fn gather_raw<S>(
        s,
        source: &Source<'_>,
        tokens: &[Token],
        dim: usize,
        eps: f32,
        rotary: Option<Rotary<'_>>,
        factor: f32,
        dst: &mut [f32],
        padded: usize,
    ) {
        for (i, (t, dst)) in tokens.iter().zip(dst.chunks_exact_mut(padded)).enumerate() {
            // A head's rows are short and far apart, which hardware prefetchers do not follow.
            if let Some(t) = tokens.get(i + AHEAD) {
                let segment = t.segment as usize;
                let at = t.token as usize * source.pitches[segment];
                let row = source.rows[segment].wrapping_add(at);
                for line in (0..dim).step_by(16) {
                    prefetch_line(row.wrapping_add(line));
                }
            }
            let segment = t.segment as usize;
            // SAFETY: `gather_heads`, the only caller, has this as its contract.
            let row = unsafe {
                let at = source.rows[segment].add(t.token as usize * source.pitches[segment]);
                std::slice::from_raw_parts(at, dim)
            };
            if dim < padded {
                dst[dim..].fill(0.0);
            }
            let mut scale = s.splat(factor);
            if source.norms[segment].is_some() {
                let mut squares = s.splat(0.0);
                for at in (0..dim).step_by(S::LANES) {
                    let x = s.load_at(row, at);
                    squares = s.fma(x, x, squares);
                }
                let mean = s.sum(squares) / dim as f32;
                scale = s.splat(factor / (mean + eps).sqrt());
            }
            match source.norms[segment] {
                Some(weight) => {
                    for at in (0..dim).step_by(S::LANES) {
                        let y = s.mul(s.mul(s.load_at(row, at), scale), s.load_at(weight, at));
                        s.store_at(&mut dst[..dim], at, y);
                    }
                }
                None => {
                    for at in (0..dim).step_by(S::LANES) {
                        s.store_at(&mut dst[..dim], at, s.mul(s.load_at(row, at), scale));
                    }
                }
            }
            if let Some(rotary) = rotary {
                let half = dim / 2;
                let cos = &rotary.cos[t.token as usize * half..][..half];
                let sin = &rotary.sin[t.token as usize * half..][..half];
                let (first, second) = dst[..dim].split_at_mut(half);
                for at in (0..half).step_by(S::LANES) {
                    let (a, b) = (s.load_at(first, at), s.load_at(second, at));
                    let (c, d) = (s.load_at(cos, at), s.load_at(sin, at));
                    s.store_at(first, at, s.sub(s.mul(a, c), s.mul(b, d)));
                    s.store_at(second, at, s.fma(b, c, s.mul(a, d)));
                }
            }
        }
    }
}
