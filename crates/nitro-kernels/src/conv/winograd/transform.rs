//! The transforms of one tile: inputs to factors of the products, products to outputs.

use super::form::{Doubled, Form, MAX_SIDE, Same};
use super::weights::INPUT_NORM;
use crate::gemm::Activation;
use crate::math::activate;
use crate::simd::{Simd, prefetch_line, simd_kernel};

/// Where the pixels under a tile are and where their transform goes.
#[derive(Clone, Copy)]
pub(super) struct Input {
    /// The first pixel; pixels and rows of pixels are this many values apart.
    pub(super) source: *const f32,
    pub(super) pixel: usize,
    pub(super) row: usize,
    pub(super) channels: usize,
    /// Scratch of `SIDE * SIDE` runs of `padded` values; `padded` is a multiple of 16 and at least
    /// `channels`.
    pub(super) scratch: *mut f32,
    pub(super) padded: usize,
    /// The tile's row of the first point's factor, and bytes between points.
    pub(super) target: *mut u8,
    pub(super) plane: usize,
    /// Null for f32; else rows are 16-bit integers, and this receives what a step of each point's
    /// row is worth.
    pub(super) steps: *mut f32,
}

/// The `count` values at `p`, at most a vector of them.
///
/// # Safety
/// `p` must be readable for `count` values.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, count: usize) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        if count >= S::LANES {
            s.load_ptr(p)
        } else {
            s.load_part(std::slice::from_raw_parts(p, count))
        }
    }
}

/// # Safety
/// The pointers of `tile` must be valid for what its fields state.
#[inline(always)]
unsafe fn input_tile<S: Simd, F: Form>(s: S, tile: Input) {
    let side = F::SIDE;
    let (channels, padded) = (tile.channels, tile.padded);
    let zero = s.splat(0.0);
    // SAFETY: `c < channels` in the source; runs of the scratch and rows of the target hold `padded`
    // values, a multiple of the vector.
    unsafe {
        // Along x: [y][x] of pixels to [y][transformed x].
        for c in (0..channels).step_by(S::LANES) {
            let count = channels - c;
            for y in 0..side {
                let from = tile.source.add(y * tile.row + c);
                let mut values = [zero; MAX_SIDE];
                for x in 0..side {
                    values[x] = load(s, from.add(x * tile.pixel), count);
                }
                // The pixels that the tile to the right adds.
                for x in side..side + F::STEP {
                    prefetch_line(from.wrapping_add(x * tile.pixel));
                }
                let values = F::input(s, values);
                for x in 0..side {
                    s.store_ptr(tile.scratch.add((y * side + x) * padded + c), values[x]);
                }
            }
        }
        // Along y.
        for x in 0..side {
            let mut squares = [zero; MAX_SIDE];
            for c in (0..channels).step_by(S::LANES) {
                let mut values = [zero; MAX_SIDE];
                for y in 0..side {
                    values[y] = s.load_ptr(tile.scratch.add((y * side + x) * padded + c));
                }
                let values = F::input(s, values);
                for y in 0..side {
                    let point = y * side + x;
                    if tile.steps.is_null() {
                        let row = tile.target.add(point * tile.plane).cast::<f32>();
                        s.store_ptr(row.add(c), values[y]);
                    } else {
                        squares[y] = s.fma(values[y], values[y], squares[y]);
                        s.store_ptr(tile.scratch.add(point * padded + c), values[y]);
                    }
                }
            }
            if tile.steps.is_null() {
                continue;
            }
            for y in 0..side {
                let point = y * side + x;
                let norm = s.sum(squares[y]).sqrt();
                let scale = if norm > 0.0 { INPUT_NORM / norm } else { 0.0 };
                *tile.steps.add(point) = norm / INPUT_NORM;
                let scale = s.splat(scale);
                let from = tile.scratch.add(point * padded);
                let row = tile.target.add(point * tile.plane).cast::<i16>();
                for c in (0..channels).step_by(S::LANES) {
                    s.store_i16_ptr(row.add(c), s.mul(s.load_ptr(from.add(c)), scale));
                }
            }
        }
    }
}

simd_kernel! {
    /// Transforms the inputs of a tile of [`Same`], whose pointers must be valid.
    pub(super) fn input_same<S>(s, tile: Input) {
        // SAFETY: the callers fill in the pointers.
        unsafe { input_tile::<S, Same>(s, tile) };
    }
}

simd_kernel! {
    /// Transforms the inputs of a tile of [`Doubled`], whose pointers must be valid.
    pub(super) fn input_doubled<S>(s, tile: Input) {
        // SAFETY: the callers fill in the pointers.
        unsafe { input_tile::<S, Doubled>(s, tile) };
    }
}

/// The products of a tile over one panel, and where the outputs go.
#[derive(Clone, Copy)]
pub(super) struct Output {
    /// The tile's row of the first point's products, and bytes between points.
    pub(super) products: *const u8,
    pub(super) plane: usize,
    /// Null for f32; else products are 32-bit integers, a step of point `p` and column `n` being worth
    /// `row_steps[p] * column_steps[p * column_pitch + n]`.
    pub(super) row_steps: *const f32,
    pub(super) column_steps: *const f32,
    pub(super) column_pitch: usize,
    /// Columns to store.
    pub(super) columns: usize,
    /// `columns` values, or null.
    pub(super) bias: *const f32,
    /// The first output; pixels and rows of pixels are this many values apart.
    pub(super) target: *mut f32,
    pub(super) pixel: usize,
    pub(super) row: usize,
    /// Outputs that exist.
    pub(super) rows: usize,
    pub(super) pixels: usize,
    pub(super) add: bool,
    pub(super) activation: Activation,
}

/// # Safety
/// The pointers of `tile` must be valid for what its fields state; rows of products hold whole
/// vectors.
#[inline(always)]
unsafe fn output_tile<S: Simd, F: Form>(s: S, tile: Output) {
    let side = F::SIDE;
    let zero = s.splat(0.0);
    for n in (0..tile.columns).step_by(S::LANES) {
        let count = (tile.columns - n).min(S::LANES);
        // SAFETY: the caller's contract.
        unsafe {
            let mut rows = [[zero; MAX_SIDE]; 4]; // [output y][transformed x]
            for x in 0..side {
                let mut values = [zero; MAX_SIDE];
                for y in 0..side {
                    let point = y * side + x;
                    let from = tile.products.add(point * tile.plane);
                    values[y] = if tile.row_steps.is_null() {
                        s.load_ptr(from.cast::<f32>().add(n))
                    } else {
                        let worth = s.mul(
                            s.load_ptr(tile.column_steps.add(point * tile.column_pitch + n)),
                            s.splat(*tile.row_steps.add(point)),
                        );
                        s.mul(s.load_i32_ptr(from.cast::<i32>().add(n)), worth)
                    };
                }
                let values = F::output(s, values);
                for y in 0..F::OUT {
                    rows[y][x] = values[y];
                }
            }
            let bias = if tile.bias.is_null() {
                zero
            } else {
                load(s, tile.bias.add(n), count)
            };
            for (y, row) in rows.into_iter().enumerate().take(F::OUT) {
                let values = F::output(s, row);
                if y >= tile.rows {
                    break;
                }
                for x in 0..F::OUT {
                    if x >= tile.pixels {
                        break;
                    }
                    let to = tile.target.add(y * tile.row + x * tile.pixel + n);
                    let mut value = s.add(values[x], bias);
                    if tile.add {
                        value = s.add(value, load(s, to.cast_const(), count));
                    }
                    value = activate(s, tile.activation, value);
                    if count == S::LANES {
                        s.store_ptr(to, value);
                    } else {
                        s.store_part(std::slice::from_raw_parts_mut(to, count), value);
                    }
                }
            }
        }
    }
}

simd_kernel! {
    /// Transforms the products of a tile of [`Same`], whose pointers must be valid.
    pub(super) fn output_same<S>(s, tile: Output) {
        // SAFETY: the callers fill in the pointers.
        unsafe { output_tile::<S, Same>(s, tile) };
    }
}

simd_kernel! {
    /// Transforms the products of a tile of [`Doubled`], whose pointers must be valid.
    pub(super) fn output_doubled<S>(s, tile: Output) {
        // SAFETY: the callers fill in the pointers.
        unsafe { output_tile::<S, Doubled>(s, tile) };
    }
}
