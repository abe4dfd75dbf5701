//! From f32 memory to packed units: the primitives every packing routine is made of.
//!
//! All take the kernel set, whose unit says what to write and whose instruction set says how.

use super::kernel::{KernelSet, LANES, Unit};
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

    /// # Safety
    /// See [`super::interleave`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn interleave(
        low: *const f32,
        high: Option<*const f32>,
        count: usize,
        target: *mut u32,
    ) {
        // From [16 low | 16 high] to 16 pairs.
        let mut order = [0_u16; 32];
        for i in 0..16 {
            order[2 * i] = i as u16;
            order[2 * i + 1] = 16 + i as u16;
        }
        // SAFETY: 64 bytes.
        let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
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
}
