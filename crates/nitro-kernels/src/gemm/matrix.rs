//! Views of matrices in f32 memory.

use crate::error::{KernelError, check_len};

/// A matrix view over f32 memory with any strides; a transpose is another view of the same data.
#[derive(Debug, Clone, Copy)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A view of `rows` x `cols` elements; element (i, j) is `data[i * row_stride + j * col_stride]`.
    ///
    /// # Errors
    /// If the last element lies outside `data`.
    pub fn new(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, KernelError> {
        check_len(
            "matrix",
            reach(rows, cols, row_stride, col_stride),
            data.len(),
        )?;
        Ok(MatRef {
            data,
            rows,
            cols,
            row_stride,
            col_stride,
        })
    }

    /// A dense row-major matrix.
    ///
    /// # Errors
    /// If `data` holds fewer than `rows * cols` elements.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> Result<Self, KernelError> {
        MatRef::new(data, rows, cols, cols, 1)
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        MatRef {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements between the starts of neighbouring rows.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Elements between neighbouring columns.
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// Pointer to element (i, j), which must lie inside the matrix or at its edge.
    #[inline]
    pub(crate) fn at(&self, i: usize, j: usize) -> *const f32 {
        debug_assert!(i <= self.rows && j <= self.cols);
        self.data
            .as_ptr()
            .wrapping_add(i * self.row_stride + j * self.col_stride)
    }

    /// The element (i, j).
    #[inline]
    pub(crate) fn get(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.row_stride + j * self.col_stride]
    }

    /// The columns `start..start + count` of row `i`, contiguous only if `col_stride` is 1.
    #[inline]
    pub(crate) fn row_run(&self, i: usize, start: usize, count: usize) -> &'a [f32] {
        debug_assert_eq!(self.col_stride, 1);
        let from = i * self.row_stride + start;
        &self.data[from..from + count]
    }

    /// The view of columns `start..start + count`.
    pub(crate) fn columns(self, start: usize, count: usize) -> Self {
        debug_assert!(start + count <= self.cols);
        let skip = (start * self.col_stride).min(self.data.len());
        MatRef {
            data: &self.data[skip..],
            cols: count,
            ..self
        }
    }

    /// The view of rows `start..start + count`.
    pub(crate) fn row_range(self, start: usize, count: usize) -> Self {
        self.t().columns(start, count).t()
    }
}

/// Elements a strided matrix reaches from its first one.
pub(crate) fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    // Saturating: an absurd shape then simply fails the length check.
    (rows - 1)
        .saturating_mul(row_stride)
        .saturating_add((cols - 1).saturating_mul(col_stride))
        .saturating_add(1)
}
