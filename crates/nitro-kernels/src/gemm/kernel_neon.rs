//! The micro-kernel for 64-bit Arm: f32 products with NEON, 6 x 16 tiles.

use std::arch::aarch64::*;

use super::kernel::{LANES, Tile};

/// f32 products with NEON.
///
/// # Safety
/// See [`super::kernel::TileFn`].
pub(crate) unsafe fn tile_neon_f32(tile: &Tile) {
    debug_assert!(tile.vectors == 1 && tile.cols <= LANES);
    // SAFETY: the caller's contract; surplus rows are read from row 0 and never stored.
    unsafe {
        match tile.rows {
            4.. => kernel_neon_f32::<6>(tile),
            2..=3 => kernel_neon_f32::<3>(tile),
            _ => kernel_neon_f32::<1>(tile),
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn kernel_neon_f32<const ROWS: usize>(tile: &Tile) {
    let mut acc = [[vdupq_n_f32(0.0); 4]; ROWS];
    let a: [*const u8; ROWS] =
        std::array::from_fn(|row| tile.a[if row < tile.rows { row } else { 0 }]);
    let mut b = tile.b;
    for segment in 0..tile.segments {
        let mut offset = segment * tile.a_segment_step;
        for _ in 0..tile.segment_units {
            let mut lanes = [vdupq_n_f32(0.0); 4];
            for part in 0..4 {
                // SAFETY: B holds `LANES` values for each unit of K.
                lanes[part] = unsafe { vld1q_f32(b.add(part * 4)) };
            }
            for row in 0..ROWS {
                // SAFETY: each row of A is valid for every unit of K; units may be unaligned.
                let value = unsafe { a[row].add(offset).cast::<f32>().read_unaligned() };
                for part in 0..4 {
                    acc[row][part] = vfmaq_n_f32(acc[row][part], lanes[part], value);
                }
            }
            offset += tile.a_step;
            b = b.wrapping_add(LANES);
        }
    }
    for row in 0..ROWS {
        if row < tile.rows {
            let mut sums = [0.0_f32; LANES];
            for part in 0..4 {
                // SAFETY: `sums` holds sixteen values.
                unsafe { vst1q_f32(sums.as_mut_ptr().add(part * 4), acc[row][part]) };
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
