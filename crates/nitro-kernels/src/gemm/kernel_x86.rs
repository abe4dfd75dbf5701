//! Micro-kernels for x86-64: AVX-512 with BF16, AVX-512, AVX2 with FMA.

use std::arch::x86_64::*;

use super::kernel::{LANES, Tile};

/// Generates one AVX-512 kernel: a function for each (rows, vectors), and the dispatcher over them.
/// Only the multiply-add differs between f32 and bf16, since both consume four-byte units.
macro_rules! avx512_kernel {
    ($tile:ident, $kernel:ident, $features:literal, $doc:literal, $multiply_add:expr) => {
        #[doc = $doc]
        ///
        /// # Safety
        /// See [`super::kernel::TileFn`].
        pub(crate) unsafe fn $tile(tile: &Tile) {
            debug_assert!(tile.cols > (tile.vectors - 1) * LANES);
            debug_assert!(tile.cols <= tile.vectors * LANES);
            // SAFETY: the caller's contract; the row count is rounded up to a compiled variant, and
            // the kernel reads the surplus rows from row 0 and never stores them.
            unsafe {
                match (tile.vectors, tile.rows) {
                    (3, 5..) => $kernel::<8, 3>(tile),
                    (3, 3..=4) => $kernel::<4, 3>(tile),
                    (3, 2) => $kernel::<2, 3>(tile),
                    (3, _) => $kernel::<1, 3>(tile),
                    (2, 5..) => $kernel::<8, 2>(tile),
                    (2, 3..=4) => $kernel::<4, 2>(tile),
                    (2, 2) => $kernel::<2, 2>(tile),
                    (2, _) => $kernel::<1, 2>(tile),
                    (_, 5..) => $kernel::<8, 1>(tile),
                    (_, 3..=4) => $kernel::<4, 1>(tile),
                    (_, 2) => $kernel::<2, 1>(tile),
                    (_, _) => $kernel::<1, 1>(tile),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $kernel<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            let a: [*const u8; ROWS] =
                std::array::from_fn(|row| tile.a[if row < tile.rows { row } else { 0 }]);
            let mut b = tile.b;
            let step = tile.a_step;
            for segment in 0..tile.segments {
                let mut offset = segment * tile.a_segment_step;
                for _ in 0..tile.segment_units {
                    let mut lanes = [_mm512_setzero_ps(); VECTORS];
                    for vector in 0..VECTORS {
                        // SAFETY: B holds `VECTORS * LANES` values for each unit of K.
                        lanes[vector] = unsafe { _mm512_loadu_ps(b.add(vector * LANES)) };
                    }
                    for row in 0..ROWS {
                        // SAFETY: each row of A is valid for every unit of K; units may be unaligned.
                        let value = unsafe { a[row].add(offset).cast::<f32>().read_unaligned() };
                        let value = _mm512_set1_ps(value);
                        for vector in 0..VECTORS {
                            acc[row][vector] =
                                $multiply_add(acc[row][vector], value, lanes[vector]);
                        }
                    }
                    offset += step;
                    b = b.wrapping_add(VECTORS * LANES);
                }
            }
            // All vectors but the last are whole.
            let last: __mmask16 = 0xffff >> (VECTORS * LANES - tile.cols);
            let mask = |vector: usize| if vector + 1 == VECTORS { last } else { 0xffff };
            if !tile.bias.is_null() {
                for vector in 0..VECTORS {
                    // SAFETY: a non-null bias holds `cols` values; lanes beyond are masked off.
                    let bias = unsafe {
                        _mm512_maskz_loadu_ps(mask(vector), tile.bias.add(vector * LANES))
                    };
                    for row in 0..ROWS {
                        acc[row][vector] = _mm512_add_ps(acc[row][vector], bias);
                    }
                }
            }
            // The loop runs over the constant, not over `tile.rows`: a run-time index into the
            // accumulators would force them out of registers.
            for row in 0..ROWS {
                if row < tile.rows {
                    for vector in 0..VECTORS {
                        let mut sum = acc[row][vector];
                        // SAFETY: each row of C is valid for `cols` values and owned by this call;
                        // lanes beyond are masked off.
                        unsafe {
                            let c = tile.c[row].add(vector * LANES);
                            if tile.accumulate {
                                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask(vector), c));
                            }
                            _mm512_mask_storeu_ps(c, mask(vector), sum);
                        }
                    }
                }
            }
        }
    };
}

#[inline(always)]
fn as_bf16(value: __m512) -> __m512bh {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512, __m512bh>(value) }
}

avx512_kernel!(
    tile_avx512_f32,
    kernel_avx512_f32,
    "avx512f,avx512bw,avx512vl,avx512dq",
    "f32 products, 8 x 48 tiles.",
    |acc, a, b| _mm512_fmadd_ps(a, b, acc)
);

avx512_kernel!(
    tile_avx512_bf16,
    kernel_avx512_bf16,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16",
    "Products of bf16 pairs, 8 x 48 tiles.",
    |acc, a, b| _mm512_dpbf16_ps(acc, as_bf16(a), as_bf16(b))
);

/// f32 products with AVX2 and FMA, 6 x 16 tiles.
///
/// # Safety
/// See [`super::kernel::TileFn`].
pub(crate) unsafe fn tile_avx2_f32(tile: &Tile) {
    debug_assert!(tile.vectors == 1 && tile.cols <= LANES);
    // SAFETY: the caller's contract; surplus rows are read from row 0 and never stored.
    unsafe {
        match tile.rows {
            4.. => kernel_avx2_f32::<6>(tile),
            2..=3 => kernel_avx2_f32::<3>(tile),
            _ => kernel_avx2_f32::<1>(tile),
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn kernel_avx2_f32<const ROWS: usize>(tile: &Tile) {
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    let a: [*const u8; ROWS] =
        std::array::from_fn(|row| tile.a[if row < tile.rows { row } else { 0 }]);
    let mut b = tile.b;
    for segment in 0..tile.segments {
        let mut offset = segment * tile.a_segment_step;
        for _ in 0..tile.segment_units {
            // SAFETY: B holds `LANES` values for each unit of K.
            let (low, high) = unsafe { (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))) };
            for row in 0..ROWS {
                // SAFETY: each row of A is valid for every unit of K; units may be unaligned.
                let value = unsafe { a[row].add(offset).cast::<f32>().read_unaligned() };
                let value = _mm256_set1_ps(value);
                acc[row][0] = _mm256_fmadd_ps(value, low, acc[row][0]);
                acc[row][1] = _mm256_fmadd_ps(value, high, acc[row][1]);
            }
            offset += tile.a_step;
            b = b.wrapping_add(LANES);
        }
    }
    for row in 0..ROWS {
        if row < tile.rows {
            let mut sums = [0.0_f32; LANES];
            // SAFETY: `sums` holds sixteen values.
            unsafe {
                _mm256_storeu_ps(sums.as_mut_ptr(), acc[row][0]);
                _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[row][1]);
            }
            // SAFETY: each row of C is valid for `cols` values and owned by this call.
            let c = unsafe { std::slice::from_raw_parts_mut(tile.c[row], tile.cols) };
            if !tile.bias.is_null() {
                // SAFETY: a non-null bias holds `cols` values.
                let bias = unsafe { std::slice::from_raw_parts(tile.bias, tile.cols) };
                sums.iter_mut()
                    .zip(bias)
                    .for_each(|(sum, bias)| *sum += bias);
            }
            if tile.accumulate {
                c.iter_mut().zip(&sums).for_each(|(c, sum)| *c += sum);
            } else {
                c.copy_from_slice(&sums[..tile.cols]);
            }
        }
    }
}
