//! A small matrix product whose operands are in cache: the engine of the attention kernels.
//!
//! Unlike the general GEMM it packs nothing and splits no work; callers lay their operands out so
//! that the right-hand side is read in whole vectors.

use crate::simd::{Level, Simd, simd_kernel};

/// Left-hand side: element `(m, k)` is at `data[m * row + k * col]`; it is read one value at a time,
/// so that a transposed operand costs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Left<'a> {
    /// A row-major matrix with rows of `row` values.
    pub(crate) fn rows(data: &'a [f32], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The transpose of a row-major matrix with rows of `row` values.
    pub(crate) fn columns(data: &'a [f32], row: usize) -> Self {
        Self {
            data,
            row: 1,
            col: row,
        }
    }
}

/// Right-hand side: vector `v` of row `k` is at `data[k * row + v * vector]`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    data: &'a [f32],
    row: usize,
    vector: usize,
}

impl<'a> Right<'a> {
    /// A row-major matrix with rows of `row` values.
    pub(crate) fn rows(level: Level, data: &'a [f32], row: usize) -> Self {
        Self {
            data,
            row,
            vector: level.lanes(),
        }
    }

    /// The result of [`pack_transposed`] of rows of `width` values.
    pub(crate) fn packed(level: Level, data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row: level.lanes(),
            vector: width * level.lanes(),
        }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Zero,
    /// The previous contents of the destination.
    Out,
    /// This row, in every row of the destination.
    Row(&'a [f32]),
}

/// Row-major destination with rows of `row` values.
pub(crate) struct Out<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) row: usize,
}

/// Sizes of a product: `m` rows, `vectors * lanes` columns, `k` terms per sum.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) m: usize,
    pub(crate) vectors: usize,
    pub(crate) k: usize,
}

/// The operands of a product as pointers, advanced to the part at hand.
#[derive(Clone, Copy)]
struct Operands {
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    b_vector: usize,
    start: *const f32,
    start_row: usize,
    out: *mut f32,
    out_row: usize,
}

impl Operands {
    /// The part from row `m` on.
    fn at_row(self, m: usize) -> Self {
        Self {
            a: self.a.wrapping_add(m * self.a_row),
            start: self.start.wrapping_add(m * self.start_row),
            out: self.out.wrapping_add(m * self.out_row),
            ..self
        }
    }

    /// The part from vector `v` on.
    fn at_vector(self, v: usize, lanes: usize) -> Self {
        Self {
            b: self.b.wrapping_add(v * self.b_vector),
            start: self.start.wrapping_add(v * lanes),
            out: self.out.wrapping_add(v * lanes),
            ..self
        }
    }
}

/// Computes `MR` rows by `NV` vectors in registers.
///
/// # Safety
/// Every index that the tile reaches must be readable, or writable in the destination, which must
/// not overlap the factors.
#[inline(always)]
unsafe fn block<S: Simd, const MR: usize, const NV: usize>(s: S, k: usize, o: Operands) {
    // SAFETY: every access is within the part that the caller vouches for.
    unsafe {
        let mut acc = [[s.splat(0.0); NV]; MR];
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, acc) in row.iter_mut().enumerate() {
                *acc = s.load_ptr(o.start.add(i * o.start_row + j * S::LANES));
            }
        }
        let (mut pa, mut pb) = (o.a, o.b);
        for _ in 0..k {
            let mut right = [s.splat(0.0); NV];
            for (j, right) in right.iter_mut().enumerate() {
                *right = s.load_ptr(pb.add(j * o.b_vector));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let left = s.splat(*pa.add(i * o.a_row));
                for (acc, right) in row.iter_mut().zip(right) {
                    *acc = s.fma(left, right, *acc);
                }
            }
            pa = pa.wrapping_add(o.a_col);
            pb = pb.wrapping_add(o.b_row);
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, acc) in row.iter().enumerate() {
                s.store_ptr(o.out.add(i * o.out_row + j * S::LANES), *acc);
            }
        }
    }
}

/// All rows of `NV` vectors: blocks of `MR` rows, then powers of two for what is left.
///
/// # Safety
/// As [`block`], for all rows.
#[inline(always)]
unsafe fn columns<S: Simd, const MR: usize, const NV: usize>(s: S, size: Size, o: Operands) {
    let mut at = 0;
    macro_rules! rows {
        ($keyword:tt, $count:expr) => {
            $keyword $count <= size.m - at {
                // SAFETY: rows `at..at + $count` are within `m`.
                unsafe { block::<S, { $count }, NV>(s, size.k, o.at_row(at)) };
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
    fn multiply_raw<S>(s, size: Size, o: Operands) {
        // Widest group of columns that leaves a square-ish tile in the registers.
        let widest = if S::REGISTERS >= 32 { 4 } else { 2 };
        let mut done = 0;
        while done < size.vectors {
            let left = size.vectors - done;
            // Even groups: seven vectors are better done as 4 + 3 than as 4 + 2 + 1.
            let group = left.div_ceil(left.div_ceil(widest));
            let o = o.at_vector(done, S::LANES);
            // SAFETY: `multiply`, the only caller, checked the operands.
            unsafe {
                if S::REGISTERS >= 32 {
                    match group {
                        1 => columns::<S, 16, 1>(s, size, o),
                        2 => columns::<S, 12, 2>(s, size, o),
                        3 => columns::<S, 8, 3>(s, size, o),
                        _ => columns::<S, 6, 4>(s, size, o),
                    }
                } else if group == 1 {
                    columns::<S, 8, 1>(s, size, o);
                } else {
                    columns::<S, 6, 2>(s, size, o);
                }
            }
            done += group;
        }
    }
}

/// `out[m][n] = start[m][n] + sum over k of a[m][k] * b[k][n]`.
///
/// # Panics
/// If an operand is shorter than `size` reaches.
pub(crate) fn multiply(
    level: Level,
    size: Size,
    a: Left<'_>,
    b: Right<'_>,
    start: Start<'_>,
    out: Out<'_>,
) {
    let Size { m, vectors, k } = size;
    if m == 0 || vectors == 0 {
        return;
    }
    let (lanes, columns) = (level.lanes(), vectors * level.lanes());
    assert!(out.row >= columns && out.data.len() >= (m - 1) * out.row + columns);
    if k > 0 {
        assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col);
        assert!(b.data.len() >= (k - 1) * b.row + (vectors - 1) * b.vector + lanes);
    }
    if let Start::Zero = start {
        for row in out.data.chunks_mut(out.row).take(m) {
            row[..columns].fill(0.0);
        }
    }
    let target = out.data.as_mut_ptr();
    let (start, start_row) = match start {
        Start::Zero | Start::Out => (target.cast_const(), out.row),
        Start::Row(row) => {
            assert!(row.len() >= columns);
            (row.as_ptr(), 0)
        }
    };
    let operands = Operands {
        a: a.data.as_ptr(),
        a_row: a.row,
        a_col: a.col,
        b: b.data.as_ptr(),
        b_row: b.row,
        b_vector: b.vector,
        start,
        start_row,
        out: target,
        out_row: out.row,
    };
    multiply_raw(level, size, operands);
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
/// `(row, c)` goes to `dst[(row / lanes * width + c) * lanes + row % lanes]`. As [`Right::packed`] it is
/// the transposed matrix.
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
                    multiply(
                        level,
                        size,
                        // `a` is stored transposed.
                        Left::columns(&a, m),
                        Right::rows(level, &b, n),
                        Start::Row(&start),
                        Out {
                            data: &mut out,
                            row: n,
                        },
                    );
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
