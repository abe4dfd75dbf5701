//! The products of a block of tiles, one matrix product per point of evaluation.

/// Rows that [`int16`] computes at a time.
#[cfg(target_arch = "x86_64")]
pub(super) const ROWS: usize = 8;

/// Whether this machine multiplies pairs of 16-bit integers with 32-bit sums in one instruction.
pub(super) fn has_int16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx512vnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// One product of 16-bit integers: `c[rows][vectors * 16] = a[rows][2 * units] b[2 * units][..]`, where
/// pitches are in bytes and `b` is `[units][vectors * 16]` pairs. `rows` is a multiple of [`ROWS`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Int16 {
    pub(super) rows: usize,
    pub(super) units: usize,
    pub(super) vectors: usize,
    pub(super) a: *const u8,
    pub(super) a_pitch: usize,
    pub(super) b: *const i32,
    pub(super) c: *mut u8,
    pub(super) c_pitch: usize,
    /// Cache lines that the next product reads first, asked for evenly over this one.
    pub(super) ahead: *const u8,
    pub(super) ahead_lines: usize,
}

/// Computes an [`Int16`] product.
///
/// # Safety
/// The machine must support AVX-512 VNNI ([`has_int16`]), and the pointers must be valid for what the
/// sizes state.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn int16(product: &Int16) {
    // SAFETY: the caller's contract.
    unsafe {
        match product.vectors {
            1 => rows::<1>(product),
            2 => rows::<2>(product),
            _ => rows::<3>(product),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn rows<const VECTORS: usize>(product: &Int16) {
    use std::arch::x86_64::*;
    let mut line = 0;
    for start in (0..product.rows).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_si512(); VECTORS]; ROWS];
        let a: [*const u8; ROWS] =
            std::array::from_fn(|row| product.a.wrapping_add((start + row) * product.a_pitch));
        let mut b = product.b;
        for unit in 0..product.units {
            let mut right = [_mm512_setzero_si512(); VECTORS];
            for (vector, right) in right.iter_mut().enumerate() {
                // SAFETY: B holds `VECTORS` vectors for each unit.
                *right = unsafe { _mm512_loadu_si512(b.add(vector * 16).cast()) };
            }
            for row in 0..ROWS {
                // SAFETY: each row of A holds `units` pairs.
                let pair = unsafe { a[row].add(unit * 4).cast::<i32>().read_unaligned() };
                let pair = _mm512_set1_epi32(pair);
                for vector in 0..VECTORS {
                    sums[row][vector] = _mm512_dpwssd_epi32(sums[row][vector], pair, right[vector]);
                }
            }
            b = b.wrapping_add(VECTORS * 16);
            if line < product.ahead_lines {
                _mm_prefetch::<_MM_HINT_T1>(product.ahead.wrapping_add(line * 64).cast());
            }
            line += 1;
        }
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                // SAFETY: each row of C holds `VECTORS` vectors.
                unsafe {
                    let c = product.c.add((start + row) * product.c_pitch + vector * 64);
                    _mm512_storeu_si512(c.cast(), sums[row][vector]);
                }
            }
        }
    }
}
