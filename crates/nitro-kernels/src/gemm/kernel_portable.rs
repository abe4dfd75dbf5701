//! The micro-kernel in plain Rust, for machines without one of their own.

use super::kernel::{LANES, Tile};

/// # Safety
/// See [`super::kernel::TileFn`].
pub(crate) unsafe fn tile_portable_f32(tile: &Tile) {
    match tile.rows {
        1 => {
            // SAFETY: the caller's contract.
            unsafe { tile_rows::<1>(tile) }
        }
        2 => {
            // SAFETY: the caller's contract.
            unsafe { tile_rows::<2>(tile) }
        }
        _ => {
            // SAFETY: the caller's contract.
            unsafe { tile_rows::<4>(tile) }
        }
    }
}

/// # Safety
/// See [`super::kernel::TileFn`]; `tile.rows <= ROWS` and `tile.vectors == 1`.
unsafe fn tile_rows<const ROWS: usize>(tile: &Tile) {
    debug_assert!(tile.rows <= ROWS && tile.vectors == 1);
    let mut acc = [[0.0_f32; LANES]; ROWS];
    let a: [*const u8; ROWS] =
        std::array::from_fn(|row| tile.a[if row < tile.rows { row } else { 0 }]);
    let mut b = tile.b;
    for segment in 0..tile.segments {
        let mut offset = segment * tile.a_segment_step;
        for _ in 0..tile.segment_units {
            // SAFETY: B holds `LANES` values for each unit of K.
            let lanes = unsafe { b.cast::<[f32; LANES]>().read() };
            for row in 0..ROWS {
                // SAFETY: each row of A is valid for every unit of K; units may be unaligned.
                let value = unsafe { a[row].add(offset).cast::<f32>().read_unaligned() };
                for lane in 0..LANES {
                    acc[row][lane] += value * lanes[lane];
                }
            }
            offset += tile.a_step;
            b = b.wrapping_add(LANES);
        }
    }
    for row in 0..tile.rows {
        // SAFETY: each row of C is valid for `cols` elements and owned by this call.
        let c = unsafe { std::slice::from_raw_parts_mut(tile.c[row], tile.cols) };
        if !tile.bias.is_null() {
            // SAFETY: a non-null bias holds `cols` elements.
            let bias = unsafe { std::slice::from_raw_parts(tile.bias, tile.cols) };
            acc[row]
                .iter_mut()
                .zip(bias)
                .for_each(|(sum, bias)| *sum += bias);
        }
        if tile.accumulate {
            c.iter_mut().zip(&acc[row]).for_each(|(c, sum)| *c += sum);
        } else {
            c.copy_from_slice(&acc[row][..tile.cols]);
        }
    }
}
