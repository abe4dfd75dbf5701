//! Attention with queries in lanes, for AVX-512 BF16.
//!
//! Scores are computed transposed, keys by queries: eight keys by up to 48 queries are a tile of sums
//! in registers, whose exponentials, two keys at a time, are already the pairs that the second product
//! reads. So scores never go to memory, sums over keys are sums of registers, and both products have
//! full tiles whatever the head's width.

use std::arch::x86_64::*;

use super::softmax_x86::exp2;
use crate::gemm::{KernelSet, LANES, transpose16};

/// Keys of a tile of scores, and channels of a tile of outputs.
const TILE: usize = 8;
/// The widest panel of queries, in vectors.
const PANEL: usize = 3;

/// The operands of one head, and room for intermediate results.
pub(super) struct Head {
    pub(super) keys: usize,
    pub(super) queries: usize,
    /// Channels; a multiple of 32.
    pub(super) dim: usize,
    /// Scores cannot leave the range of `2^x`.
    pub(super) bounded: bool,
    /// Rows of pairs of channels, `[keys][dim / 2]`.
    pub(super) packed_keys: *const u32,
    /// Pairs of keys, `[keys / 2][dim]`.
    pub(super) packed_values: *const u32,
    /// Pairs of channels, `[dim / 2][queries to whole vectors]`.
    pub(super) packed_queries: *const u32,
    /// [`probabilities_len`] values.
    pub(super) probabilities: *mut u32,
    /// [`outputs_len`] values.
    pub(super) outputs: *mut u32,
}

/// Values that [`Head::probabilities`] has room for.
pub(super) fn probabilities_len(keys: usize) -> usize {
    keys.next_multiple_of(TILE) / 2 * PANEL * LANES
}

/// Values that [`Head::outputs`] has room for.
pub(super) fn outputs_len(dim: usize) -> usize {
    PANEL * LANES * dim
}

/// In what form outputs leave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Pairs of bf16.
    Pairs,
    /// f32.
    Single,
}

/// Turns rows of pairs into columns: `rows [count][units]` to `columns [units][pitch]`, for `units` a
/// multiple of sixteen. Lanes beyond `count` are arbitrary.
///
/// # Safety
/// `rows` must be valid for `count` rows, `columns` for as many columns, rounded up to sixteen.
pub(super) unsafe fn columns_of(
    set: &KernelSet,
    rows: *const u32,
    count: usize,
    units: usize,
    columns: *mut u32,
    pitch: usize,
) {
    let mut square = [0_u32; LANES * LANES];
    for first in (0..count).step_by(LANES) {
        for unit in (0..units).step_by(LANES) {
            // SAFETY: the caller's contract; a square holds sixteen rows.
            unsafe {
                for lane in 0..LANES.min(count - first) {
                    let from = rows.add((first + lane) * units + unit);
                    let to = square.as_mut_ptr().add(lane * LANES);
                    std::ptr::copy_nonoverlapping(from, to, LANES);
                }
                let to = columns.add(unit * pitch + first);
                transpose16(set, square.as_ptr(), to, pitch, LANES);
            }
        }
    }
}

impl Head {
    /// Attends with all queries. Writes the output of query `i` to the bytes from `target(i)` on.
    ///
    /// # Safety
    /// The machine must have AVX-512 BF16; the operands must hold what their documentation says, and
    /// targets `dim` elements of the form each.
    pub(super) unsafe fn run(
        &self,
        set: &KernelSet,
        form: Form,
        target: impl Fn(usize) -> *mut u8,
    ) {
        let vectors = self.queries.div_ceil(LANES);
        let panels = vectors.div_ceil(PANEL);
        let units = match form {
            Form::Pairs => self.dim / 2,
            Form::Single => self.dim,
        };
        let mut square = [0_u32; LANES * LANES];
        for panel in 0..panels {
            // Panels as equal as can be.
            let (first, end) = (vectors * panel / panels, vectors * (panel + 1) / panels);
            // SAFETY: the caller's contract.
            unsafe {
                match end - first {
                    1 => self.panel::<1>(first, form),
                    2 => self.panel::<2>(first, form),
                    _ => self.panel::<3>(first, form),
                }
            }
            for vector in first..end {
                // SAFETY: as above; the outputs hold `units` rows of sixteen lanes for each vector.
                unsafe {
                    let from = self.outputs.add((vector - first) * units * LANES);
                    for unit in (0..units).step_by(LANES) {
                        let from = from.add(unit * LANES);
                        transpose16(set, from, square.as_mut_ptr(), LANES, LANES);
                        let queries = vector * LANES..self.queries.min((vector + 1) * LANES);
                        for (query, row) in queries.zip(square.chunks_exact(LANES)) {
                            let to = target(query).add(unit * 4).cast::<u32>();
                            std::ptr::copy_nonoverlapping(row.as_ptr(), to, LANES);
                        }
                    }
                }
            }
        }
    }

    /// Attends with `VECTORS` vectors of queries from vector `first` on, and leaves the outputs as
    /// `[vector][units of the form][16]`.
    ///
    /// # Safety
    /// As [`Head::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn panel<const VECTORS: usize>(&self, first: usize, form: Form) {
        // SAFETY: the caller's contract; a tile's surplus keys read the last one.
        unsafe {
            let queries = self.packed_queries.add(first * LANES);
            let tile = |key: usize, start| self.scores::<VECTORS>(key, queries, start);
            let mut start = [_mm512_setzero_ps(); VECTORS];
            if !self.bounded {
                let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
                for key in (0..self.keys).step_by(TILE) {
                    for row in tile(key, start) {
                        for v in 0..VECTORS {
                            largest[v] = _mm512_max_ps(largest[v], row[v]);
                        }
                    }
                }
                for v in 0..VECTORS {
                    start[v] = _mm512_sub_ps(_mm512_setzero_ps(), largest[v]);
                }
            }
            let mut sums = [_mm512_setzero_ps(); VECTORS];
            let mut to = self.probabilities;
            for key in (0..self.keys).step_by(TILE) {
                let scores = tile(key, start);
                for i in (0..TILE).step_by(2) {
                    for v in 0..VECTORS {
                        let mut both = [_mm512_setzero_ps(); 2];
                        for (j, p) in both.iter_mut().enumerate() {
                            if key + i + j < self.keys {
                                *p = exp2(scores[i + j][v]);
                                sums[v] = _mm512_add_ps(sums[v], *p);
                            }
                        }
                        _mm512_storeu_si512(to.cast(), pairs(both[0], both[1]));
                        to = to.add(LANES);
                    }
                }
            }
            for sum in &mut sums {
                // What no key contributes to is zero.
                let any = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(*sum, _mm512_setzero_ps());
                *sum = _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0), *sum);
            }
            for channel in (0..self.dim).step_by(TILE) {
                let mut acc = [[_mm512_setzero_ps(); VECTORS]; TILE];
                let mut values = self.packed_values.add(channel).cast::<f32>();
                let mut probabilities = self.probabilities.cast_const().cast::<f32>();
                for _ in 0..self.keys.div_ceil(2) {
                    multiply_add(&mut acc, probabilities, |row| *values.add(row));
                    values = values.add(self.dim);
                    probabilities = probabilities.add(VECTORS * LANES);
                }
                for v in 0..VECTORS {
                    for row in &mut acc {
                        row[v] = _mm512_mul_ps(row[v], sums[v]);
                    }
                    match form {
                        Form::Single => {
                            let to = self.outputs.add((v * self.dim + channel) * LANES);
                            for (i, row) in acc.iter().enumerate() {
                                _mm512_storeu_ps(to.add(i * LANES).cast(), row[v]);
                            }
                        }
                        Form::Pairs => {
                            let to = self.outputs.add((v * self.dim + channel) / 2 * LANES);
                            for i in 0..TILE / 2 {
                                let both = pairs(acc[2 * i][v], acc[2 * i + 1][v]);
                                _mm512_storeu_si512(to.add(i * LANES).cast(), both);
                            }
                        }
                    }
                }
            }
        }
    }

    /// `start + q . k` of eight keys from `key` on.
    ///
    /// # Safety
    /// As [`Head::run`]; `queries` is the first of the vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn scores<const VECTORS: usize>(
        &self,
        key: usize,
        queries: *const u32,
        start: [__m512; VECTORS],
    ) -> [[__m512; VECTORS]; TILE] {
        let (units, pitch) = (self.dim / 2, self.queries.next_multiple_of(LANES));
        let keys: [*const f32; TILE] = std::array::from_fn(|i| {
            let key = (key + i).min(self.keys - 1);
            self.packed_keys.wrapping_add(key * units).cast()
        });
        let mut acc = [start; TILE];
        for unit in 0..units {
            // SAFETY: the caller's contract.
            unsafe {
                let queries = queries.add(unit * pitch).cast();
                multiply_add(&mut acc, queries, |row| *keys[row].add(unit));
            }
        }
        acc
    }
}

/// `acc[row] += left(row) . right`, products of pairs of bf16.
///
/// # Safety
/// `right` must be valid for `VECTORS` vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn multiply_add<const VECTORS: usize>(
    acc: &mut [[__m512; VECTORS]; TILE],
    right: *const f32,
    left: impl Fn(usize) -> f32,
) {
    // SAFETY: the caller's contract; all types of a vector are 64 bytes of plain data.
    unsafe {
        let as_bf16 = |x: __m512| std::mem::transmute::<__m512, __m512bh>(x);
        let right: [__m512; VECTORS] =
            std::array::from_fn(|v| _mm512_loadu_ps(right.add(v * LANES)));
        for (row, acc) in acc.iter_mut().enumerate() {
            let left = as_bf16(_mm512_set1_ps(left(row)));
            for v in 0..VECTORS {
                acc[v] = _mm512_dpbf16_ps(acc[v], left, as_bf16(right[v]));
            }
        }
    }
}

/// Sixteen pairs of bf16: `low[i]` in the lower half of lane `i`, `high[i]` in the upper.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn pairs(low: __m512, high: __m512) -> __m512i {
    let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let upper = _mm512_slli_epi32::<16>(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)));
    // SAFETY: both types are 64 bytes of plain data.
    let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
    _mm512_permutexvar_epi16(_mm512_or_si512(lanes, upper), both)
}
