//! A small matrix product whose operands are in cache: the engine of the attention kernels.
//!
//! Unlike the general GEMM it packs nothing and splits no work; callers lay their operands out so
//! that the right-hand side is read in whole vectors.

use crate::simd::{Level, Simd, simd_kernel};

/// Left-hand side: element `(m, k)` is at `ptr[m * row + k * col]`; it is read one value at a time,
/// so that a transposed operand costs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) ptr: *const f32,
    pub(crate) row: usize,
    pub(crate) col: usize,
}

/// Right-hand side: vector `v` of row `k` is at `ptr[k * row + v * vector]`.
///
/// A row-major matrix has `vector = lanes`; one packed by [`pack_transposed`] has `row = lanes`.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub(crate) ptr: *const f32,
    pub(crate) row: usize,
    pub(crate) vector: usize,
}

/// What the product is added to: element `(m, n)` is at `ptr[m * row + n]`; `row = 0` repeats one row.
#[derive(Clone, Copy)]
pub(crate) struct Start {
    pub(crate) ptr: *const f32,
    pub(crate) row: usize,
}

/// Row-major destination.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub(crate) ptr: *mut f32,
    pub(crate) row: usize,
}

/// Sizes of a product: `m` rows, `vectors * lanes` columns, `k` terms per sum.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) m: usize,
    pub(crate) vectors: usize,
    pub(crate) k: usize,
}

/// Computes `MR` rows by `NV` vectors in registers.
///
/// # Safety
/// As [`multiply`], for this part of the matrices.
#[inline(always)]
unsafe fn block<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    k: usize,
    a: Left,
    b: Right,
    start: Start,
    out: Out,
) {
    // SAFETY: every access is within the part that the caller vouches for.
    unsafe {
        let mut acc = [[s.splat(0.0); NV]; MR];
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, acc) in row.iter_mut().enumerate() {
                *acc = s.load_ptr(start.ptr.add(i * start.row + j * S::LANES));
            }
        }
        let (mut pa, mut pb) = (a.ptr, b.ptr);
        for _ in 0..k {
            let mut right = [s.splat(0.0); NV];
            for (j, right) in right.iter_mut().enumerate() {
                *right = s.load_ptr(pb.add(j * b.vector));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let left = s.splat(*pa.add(i * a.row));
                for (acc, right) in row.iter_mut().zip(right) {
                    *acc = s.fma(left, right, *acc);
                }
            }
            pa = pa.wrapping_add(a.col);
            pb = pb.wrapping_add(b.row);
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, acc) in row.iter().enumerate() {
                s.store_ptr(out.ptr.add(i * out.row + j * S::LANES), *acc);
            }
        }
    }
}

/// All rows of `NV` vectors: blocks of `MR` rows, then powers of two for what is left.
///
/// # Safety
/// As [`multiply`], for these columns.
#[inline(always)]
unsafe fn columns<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    size: Size,
    a: Left,
    b: Right,
    start: Start,
    out: Out,
) {
    let mut at = 0;
    macro_rules! rows {
        ($keyword:tt, $count:expr) => {
            $keyword $count <= size.m - at {
                // SAFETY: rows `at..at + $count` are within `m`.
                unsafe {
                    block::<S, { $count }, NV>(
                        s,
                        size.k,
                        Left { ptr: a.ptr.add(at * a.row), ..a },
                        b,
                        Start { ptr: start.ptr.add(at * start.row), ..start },
                        Out { ptr: out.ptr.add(at * out.row), ..out },
                    );
                }
                at += $count;
            }
        };
    }
    rows!(while, MR);
    if MR > 8 {
        rows!(if, 8);
    }
    if MR > 4 {
        rows!(if, 4);
    }
    rows!(if, 2);
    rows!(if, 1);
    debug_assert_eq!(at, size.m);
}

simd_kernel! {
    fn multiply_raw<S>(s, size: Size, a: Left, b: Right, start: Start, out: Out) {
        // Widest group of columns that leaves a square-ish tile in the registers.
        let widest = if S::REGISTERS >= 32 { 4 } else { 2 };
        let mut done = 0;
        while done < size.vectors {
            let left = size.vectors - done;
            // Even groups: seven vectors are better done as 4 + 3 than as 4 + 2 + 1.
            let group = left.div_ceil(left.div_ceil(widest));
            let b = Right { ptr: b.ptr.wrapping_add(done * b.vector), ..b };
            let start = Start { ptr: start.ptr.wrapping_add(done * S::LANES), ..start };
            let out = Out { ptr: out.ptr.wrapping_add(done * S::LANES), ..out };
            // SAFETY: `multiply`, the only caller, has the same contract.
            unsafe {
                if S::REGISTERS >= 32 {
                    match group {
                        1 => columns::<S, 16, 1>(s, size, a, b, start, out),
                        2 => columns::<S, 12, 2>(s, size, a, b, start, out),
                        3 => columns::<S, 8, 3>(s, size, a, b, start, out),
                        _ => columns::<S, 6, 4>(s, size, a, b, start, out),
                    }
                } else if group == 1 {
                    columns::<S, 8, 1>(s, size, a, b, start, out);
                } else {
                    columns::<S, 6, 2>(s, size, a, b, start, out);
                }
            }
            done += group;
        }
    }
}

/// `out[m][n] = start[m][n] + sum over k of a[m][k] * b[k][n]`.
///
/// # Safety
/// The operands must be readable, and `out` writable, at every index that `size` reaches; `out` may
/// coincide with `start` but must not overlap `a` or `b`.
pub(crate) unsafe fn multiply(level: Level, size: Size, a: Left, b: Right, start: Start, out: Out) {
    multiply_raw(level, size, a, b, start, out);
}

simd_kernel! {
    fn pack_raw<S>(s, rows: usize, width: usize, src: *const f32, dst: *mut f32) {
        for v in 0..rows / S::LANES {
            for c in (0..width).step_by(S::LANES) {
                // SAFETY: `pack_transposed` checked both buffers.
                unsafe {
                    s.transpose_block(
                        src.add(v * S::LANES * width + c),
                        width,
                        dst.add((v * width + c) * S::LANES),
                        S::LANES,
                    );
                }
            }
        }
    }
}

/// Transposes `src` `[rows, width]` (both multiples of the lanes) into vectors of rows: element
/// `(row, c)` goes to `dst[(row / lanes * width + c) * lanes + row % lanes]`. Read as [`Right`] it is
/// the transposed matrix, with `row = lanes` and `vector = width * lanes`.
pub(crate) fn pack_transposed(level: Level, width: usize, src: &[f32], dst: &mut [f32]) {
    let rows = src.len() / width;
    assert!(width.is_multiple_of(level.lanes()) && rows.is_multiple_of(level.lanes()));
    assert!(rows * width == src.len() && src.len() == dst.len());
    pack_raw(level, rows, width, src.as_ptr(), dst.as_mut_ptr());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, to_f64};

    #[test]
    fn products_match_f64_for_every_tile_shape() {
        for level in Level::available() {
            let lanes = level.lanes();
            for m in (1..=20).chain([37]) {
                for vectors in 1..=7 {
                    let (k, n) = (5, vectors * lanes);
                    let a = random(1, m * k);
                    let b = random(2, k * n);
                    let start = random(3, n);
                    let mut out = vec![f32::NAN; m * n];
                    let size = Size { m, vectors, k };
                    // SAFETY: the buffers have exactly the sizes given.
                    unsafe {
                        multiply(
                            level,
                            size,
                            // `a` is stored transposed.
                            Left {
                                ptr: a.as_ptr(),
                                row: 1,
                                col: m,
                            },
                            Right {
                                ptr: b.as_ptr(),
                                row: n,
                                vector: lanes,
                            },
                            Start {
                                ptr: start.as_ptr(),
                                row: 0,
                            },
                            Out {
                                ptr: out.as_mut_ptr(),
                                row: n,
                            },
                        );
                    }
                    let (a, b) = (to_f64(&a), to_f64(&b));
                    let expected: Vec<f64> = (0..m * n)
                        .map(|i| {
                            let (row, col) = (i / n, i % n);
                            f64::from(start[col])
                                + (0..k).map(|t| a[t * m + row] * b[t * n + col]).sum::<f64>()
                        })
                        .collect();
                    assert_close(&format!("{level:?} {m}x{n}"), &out, &expected);
                }
            }
        }
    }

    #[test]
    fn packing_transposes() {
        for level in Level::available() {
            let lanes = level.lanes();
            let (rows, width) = (3 * lanes, 2 * lanes);
            let src = random(1, rows * width);
            let mut dst = vec![0.0; src.len()];
            pack_transposed(level, width, &src, &mut dst);
            for row in 0..rows {
                for c in 0..width {
                    let at = (row / lanes * width + c) * lanes + row % lanes;
                    assert_eq!(dst[at], src[row * width + c], "{level:?} {row} {c}");
                }
            }
        }
    }
}
