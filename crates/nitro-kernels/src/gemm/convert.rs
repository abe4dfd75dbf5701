//! From f32 memory to packed units: the primitives every packing routine is made of.
//!
//! All take the kernel set, whose unit says what to write and whose instruction set says how.

use super::kernel::{KernelSet, LANES, Unit};
#[cfg(any(target_arch = "x86_64", test))]
use crate::isa::Isa;

/// Rounds to bf16 (nearest, ties to even); the result's upper 16 bits are the bf16.
#[inline(always)]
fn round_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    // A NaN must stay one: rounding could carry its mantissa into the sign. Select, not branch, so
    // that the loop vectorises.
    if x.is_nan() {
        (bits | 0x0040_0000) & 0xffff_0000
    } else {
        rounded
    }
}

/// Writes `source` as consecutive elements (`source.len() * unit.element_bytes()` bytes).
///
/// # Safety
/// `target` must be valid for that many bytes; it may be unaligned.
#[inline]
pub(crate) unsafe fn convert_run(set: &KernelSet, source: &[f32], target: *mut u8) {
    match set.unit {
        Unit::F32 => {
            // SAFETY: the caller's contract; source and target are different allocations.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr().cast(), target, source.len() * 4);
            }
        }
        Unit::F32Rounded => {
            for (i, &x) in source.iter().enumerate() {
                // SAFETY: the caller's contract.
                unsafe { target.cast::<u32>().add(i).write_unaligned(round_bits(x)) };
            }
        }
        #[cfg(target_arch = "x86_64")]
        Unit::Bf16Pair if set.isa == Isa::Avx512Bf16 => {
            // SAFETY: the caller's contract; kernel sets exist only for supported instruction sets.
            unsafe { x86::convert_run(source, target.cast()) }
        }
        Unit::Bf16Pair => {
            for (i, &x) in source.iter().enumerate() {
                let value = (round_bits(x) >> 16) as u16;
                // SAFETY: the caller's contract.
                unsafe { target.cast::<u16>().add(i).write_unaligned(value) };
            }
        }
    }
}

/// Writes one unit for each `i`: `low[i]` for one-element units, `(low[i], high[i])` for pairs. A
/// missing `high` reads as zeros.
///
/// # Safety
/// `low` (and `high` if present) must be valid for `count` reads, `target` for `count` four-byte
/// writes.
#[inline]
pub(crate) unsafe fn interleave(
    set: &KernelSet,
    low: *const f32,
    high: Option<*const f32>,
    count: usize,
    target: *mut u32,
) {
    match set.unit {
        Unit::F32 | Unit::F32Rounded => {
            // SAFETY: the caller's contract.
            unsafe {
                convert_run(set, std::slice::from_raw_parts(low, count), target.cast());
            }
        }
        #[cfg(target_arch = "x86_64")]
        Unit::Bf16Pair if set.isa == Isa::Avx512Bf16 => {
            // SAFETY: the caller's contract; kernel sets exist only for supported instruction sets.
            unsafe { x86::interleave(low, high, count, target) }
        }
        Unit::Bf16Pair => {
            for i in 0..count {
                // SAFETY: the caller's contract.
                unsafe {
                    let high = high.map_or(0, |high| round_bits(*high.add(i)));
                    let low = round_bits(*low.add(i)) >> 16;
                    target.add(i).write_unaligned(high | low);
                }
            }
        }
    }
}

/// Rows of a matrix as consecutive units: unit `u` pairs row `u * depth` with the next one (where the
/// unit has two elements). Columns are cut into chunks of `chunk`, 8 or 16; those of chunk `c` go to
/// `target[u * unit_pitch + c * chunk_pitch ..]`. Columns beyond `count` are not written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interleave {
    /// Rows of the source; an odd last row is paired with zeros.
    pub(crate) rows: usize,
    /// Elements between neighbouring rows of the source.
    pub(crate) stride: usize,
    /// Columns.
    pub(crate) count: usize,
    pub(crate) unit_pitch: usize,
    pub(crate) chunk: usize,
    pub(crate) chunk_pitch: usize,
}

/// Writes the units described by `shape`.
///
/// # Safety
/// `source` must be valid for the rows and `target` for the positions described.
pub(crate) unsafe fn interleave_rows(
    set: &KernelSet,
    shape: Interleave,
    source: *const f32,
    target: *mut u32,
) {
    let depth = set.unit.depth();
    #[cfg(target_arch = "x86_64")]
    if set.unit == Unit::Bf16Pair && set.isa == Isa::Avx512Bf16 {
        // SAFETY: the caller's contract; kernel sets exist only for supported instruction sets.
        unsafe { x86::interleave_rows(shape, source, target) };
        return;
    }
    for unit in 0..shape.rows.div_ceil(depth) {
        let row = unit * depth;
        for column in (0..shape.count).step_by(shape.chunk) {
            let columns = (shape.count - column).min(shape.chunk);
            // SAFETY: the caller's contract.
            unsafe {
                let low = source.add(row * shape.stride + column);
                let high = (depth == 2 && row + 1 < shape.rows).then(|| low.add(shape.stride));
                let to =
                    target.add(unit * shape.unit_pitch + column / shape.chunk * shape.chunk_pitch);
                interleave(set, low, high, columns, to);
            }
        }
    }
}

/// Transposes a 16 x 16 block of four-byte units: `target[j * stride + i] = source[i * 16 + j]` for
/// `j < columns`.
///
/// # Safety
/// `source` must be valid for 256 reads, `target` for the positions above.
#[inline]
pub(crate) unsafe fn transpose16(
    set: &KernelSet,
    source: *const u32,
    target: *mut u32,
    stride: usize,
    columns: usize,
) {
    match set.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512 => {
            // SAFETY: the caller's contract; kernel sets exist only for supported instruction sets.
            unsafe { x86::transpose16(source, target, stride, columns) }
        }
        _ => {
            for j in 0..columns {
                for i in 0..LANES {
                    // SAFETY: the caller's contract.
                    unsafe { *target.add(j * stride + i) = *source.add(i * LANES + j) };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// How many rows ahead [`interleave_rows`] fetches.
    const PREFETCH_ROWS: usize = 16;

    fn bytes(value: __m512bh) -> __m512i {
        // SAFETY: both are 64 bytes of plain data.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(value) }
    }

    /// The low `count` lanes of sixteen.
    fn mask(count: usize) -> __mmask16 {
        if count >= 16 {
            0xffff
        } else {
            (1 << count) - 1
        }
    }

    /// # Safety
    /// `target` must be valid for `source.len()` writes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn convert_run(source: &[f32], target: *mut u16) {
        let count = source.len();
        let from = source.as_ptr();
        let mut i = 0;
        while i + 32 <= count {
            // SAFETY: i + 32 <= count.
            unsafe {
                let low = _mm512_loadu_ps(from.add(i));
                let high = _mm512_loadu_ps(from.add(i + 16));
                let both = bytes(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(target.add(i).cast(), both);
            }
            i += 32;
        }
        if i < count {
            let rest = count - i;
            // SAFETY: masked lanes are neither read nor written.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask(rest), from.add(i));
                let high = if rest > 16 {
                    _mm512_maskz_loadu_ps(mask(rest - 16), from.add(i + 16))
                } else {
                    _mm512_setzero_ps()
                };
                let both = bytes(_mm512_cvtne2ps_pbh(high, low));
                _mm512_mask_storeu_epi16(target.add(i).cast(), (1_u32 << rest) - 1, both);
            }
        }
    }

    /// The permutation from `[16 low | 16 high]` to 16 pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn pair_order() -> __m512i {
        // Lane i: (i, 16 + i).
        let low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let high = _mm512_slli_epi32::<16>(_mm512_add_epi32(low, _mm512_set1_epi32(16)));
        _mm512_or_si512(low, high)
    }

    /// # Safety
    /// See [`super::interleave`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn interleave(
        low: *const f32,
        high: Option<*const f32>,
        count: usize,
        target: *mut u32,
    ) {
        let order = pair_order();
        let mut i = 0;
        while i < count {
            let mask = mask(count - i);
            // SAFETY: masked lanes are neither read nor written.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask, low.add(i));
                let high = match high {
                    Some(high) => _mm512_maskz_loadu_ps(mask, high.add(i)),
                    None => _mm512_setzero_ps(),
                };
                let both = bytes(_mm512_cvtne2ps_pbh(high, low));
                let pairs = _mm512_permutexvar_epi16(order, both);
                _mm512_mask_storeu_epi32(target.add(i).cast(), mask, pairs);
            }
            i += 16;
        }
    }

    /// # Safety
    /// See [`super::interleave_rows`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn interleave_rows(
        shape: super::Interleave,
        source: *const f32,
        target: *mut u32,
    ) {
        let order = pair_order();
        let chunks = shape.count.div_ceil(16);
        for unit in 0..shape.rows.div_ceil(2) {
            let from = source.wrapping_add(2 * unit * shape.stride);
            let paired = 2 * unit + 1 < shape.rows;
            let to = target.wrapping_add(unit * shape.unit_pitch);
            for chunk in 0..chunks {
                let mask = mask(shape.count - chunk * 16);
                // Rows are far apart, so the hardware does not see them coming.
                let ahead = from.wrapping_add(PREFETCH_ROWS * shape.stride + chunk * 16);
                // SAFETY: a prefetch of any address is harmless; masked lanes are neither read nor
                // written.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(shape.stride).cast());
                    let low = from.add(chunk * 16);
                    let high = if paired {
                        _mm512_maskz_loadu_ps(mask, low.add(shape.stride))
                    } else {
                        _mm512_setzero_ps()
                    };
                    let low = _mm512_maskz_loadu_ps(mask, low);
                    let both = bytes(_mm512_cvtne2ps_pbh(high, low));
                    let pairs = _mm512_permutexvar_epi16(order, both);
                    if shape.chunk == 16 {
                        let to = to.add(chunk * shape.chunk_pitch);
                        _mm512_mask_storeu_epi32(to.cast(), mask, pairs);
                    } else {
                        let to = to.add(2 * chunk * shape.chunk_pitch);
                        let low = _mm512_castsi512_si256(pairs);
                        _mm256_mask_storeu_epi32(to.cast(), mask as __mmask8, low);
                        if mask > 0xff {
                            let to = to.add(shape.chunk_pitch);
                            let high = _mm512_extracti64x4_epi64::<1>(pairs);
                            _mm256_mask_storeu_epi32(to.cast(), (mask >> 8) as __mmask8, high);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// See [`super::transpose16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn transpose16(
        source: *const u32,
        target: *mut u32,
        stride: usize,
        columns: usize,
    ) {
        // Four rounds; each exchanges one bit of the row index with one bit of the column index.
        let mut r = [_mm512_setzero_si512(); 16];
        for i in 0..16 {
            // SAFETY: the source holds 256 units.
            r[i] = unsafe { _mm512_loadu_si512(source.add(i * 16).cast()) };
        }
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // r[4g + c] now holds, in 128-bit lane l, column 4l + c of rows 4g..4g+4.
        for c in 0..4 {
            let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(r[c], r[4 + c]);
            let high = _mm512_shuffle_i32x4::<0b11_01_11_01>(r[c], r[4 + c]);
            let low2 = _mm512_shuffle_i32x4::<0b10_00_10_00>(r[8 + c], r[12 + c]);
            let high2 = _mm512_shuffle_i32x4::<0b11_01_11_01>(r[8 + c], r[12 + c]);
            // low: lanes (0, 2) of rows 0..4, then of rows 4..8; high: lanes (1, 3).
            t[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low, low2);
            t[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low, low2);
            t[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(high, high2);
            t[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(high, high2);
        }
        for j in 0..16 {
            if j < columns {
                // SAFETY: the caller's contract.
                unsafe { _mm512_storeu_si512(target.add(j * stride).cast(), t[j]) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Precision;

    fn sets() -> Vec<KernelSet> {
        let mut sets = Vec::new();
        for isa in Isa::supported() {
            sets.push(KernelSet::new(isa, Precision::F32));
            sets.push(KernelSet::new(isa, Precision::Bf16));
        }
        sets
    }

    #[test]
    fn transposing_moves_every_unit() {
        let source: Vec<u32> = (0..256).collect();
        for set in sets() {
            for columns in [1, 7, 16] {
                let mut target = vec![u32::MAX; 16 * 48];
                // SAFETY: both buffers hold the positions named.
                unsafe { transpose16(&set, source.as_ptr(), target.as_mut_ptr(), 48, columns) };
                for j in 0..16 {
                    for i in 0..16 {
                        let expected = if j < columns {
                            source[i * 16 + j]
                        } else {
                            u32::MAX
                        };
                        assert_eq!(target[j * 48 + i], expected, "{:?}", set.isa);
                    }
                }
            }
        }
    }

    #[test]
    fn runs_and_pairs_hold_the_rounded_values() {
        let low: Vec<f32> = (0..77).map(|i| (i as f32 - 30.3) * 1.017).collect();
        let high: Vec<f32> = low.iter().map(|x| x * -3.3 + 1.0).collect();
        for set in sets() {
            for count in [0, 1, 15, 16, 17, 32, 33, 77] {
                let mut run = vec![0_u32; 80];
                let mut pairs = vec![0_u32; 80];
                // SAFETY: the buffers hold more than 77 units.
                unsafe {
                    convert_run(&set, &low[..count], run.as_mut_ptr().cast());
                    let high = Some(high.as_ptr());
                    interleave(&set, low.as_ptr(), high, count, pairs.as_mut_ptr());
                }
                for i in 0..count {
                    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
                    let (got_run, expected_run, expected_pair) = match set.unit {
                        Unit::F32 => (run[i], low[i].to_bits(), low[i].to_bits()),
                        Unit::F32Rounded => (run[i], bits(low[i]) << 16, bits(low[i]) << 16),
                        Unit::Bf16Pair => (
                            (run[i / 2] >> (16 * (i % 2))) & 0xffff,
                            bits(low[i]),
                            bits(high[i]) << 16 | bits(low[i]),
                        ),
                    };
                    assert_eq!(got_run, expected_run);
                    assert_eq!(pairs[i], expected_pair);
                }
                assert!(pairs[count..].iter().all(|&unit| unit == 0));
            }
        }
    }

    #[test]
    fn rows_become_units_wherever_the_pitches_say() {
        let source: Vec<f32> = (0..7 * 50).map(|i| (i as f32 - 170.0) * 0.37).collect();
        for set in sets() {
            for (rows, count) in [(1_usize, 3_usize), (7, 40), (6, 29), (3, 16)] {
                for chunk in [8, 16] {
                    let units = rows.div_ceil(set.unit.depth());
                    let shape = Interleave {
                        rows,
                        stride: 50,
                        count,
                        unit_pitch: 18,
                        chunk,
                        chunk_pitch: 180,
                    };
                    let mut target = vec![0_u32; 1000];
                    let mut expected = vec![0_u32; 1000];
                    // SAFETY: the source holds seven rows of fifty, the targets all positions.
                    unsafe {
                        interleave_rows(&set, shape, source.as_ptr(), target.as_mut_ptr());
                        for unit in 0..units {
                            for column in 0..count {
                                let row = unit * set.unit.depth();
                                let low = source[row * 50 + column..].as_ptr();
                                let high = (row + 1 < rows).then(|| low.add(50));
                                let at = unit * 18 + column / chunk * 180 + column % chunk;
                                interleave(&set, low, high, 1, &raw mut expected[at]);
                            }
                        }
                    }
                    assert_eq!(target, expected, "{:?} {shape:?}", set.isa);
                }
            }
        }
    }
}
