//! Matrices in the bytes of a file.

use half::{bf16, f16};

use crate::error::{KernelError, check_eq};

/// How a file stores an element, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl ElementType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
        }
    }
}

/// A `[rows, columns]` matrix in the bytes of a file, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    element: ElementType,
    rows: usize,
    columns: usize,
}

impl<'a> Rows<'a> {
    /// The matrix whose elements `bytes` holds row by row.
    ///
    /// # Errors
    /// If `bytes` is not as long as the shape says.
    pub fn new(
        bytes: &'a [u8],
        element: ElementType,
        rows: usize,
        columns: usize,
    ) -> Result<Self, KernelError> {
        let needed = rows.saturating_mul(columns).saturating_mul(element.bytes());
        check_eq("bytes of a matrix", needed, bytes.len())?;
        Ok(Rows {
            bytes,
            element,
            rows,
            columns,
        })
    }

    /// A matrix in memory.
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn from_f32(values: &'a [f32], rows: usize, columns: usize) -> Result<Self, KernelError> {
        // SAFETY: any f32 is four plain bytes; the slice covers the same memory.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        Rows::new(bytes, ElementType::F32, rows, columns)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes row `row` as f32.
    ///
    /// # Panics
    /// If there is no such row, or `to` does not hold one row.
    pub fn read(&self, row: usize, to: &mut [f32]) {
        assert_eq!(to.len(), self.columns, "room for one row");
        let size = self.columns * self.element.bytes();
        let bytes = &self.bytes[row * size..(row + 1) * size];
        match self.element {
            ElementType::F32 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*b);
                }
            }
            ElementType::Bf16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = bf16::from_le_bytes(*b).to_f32();
                }
            }
            ElementType::F16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }
}

/// Row `row` of stacked layers, if there is one.
pub(super) fn read_row(layers: &[Rows<'_>], mut row: usize, to: &mut [f32]) -> bool {
    for layer in layers {
        if row < layer.rows() {
            layer.read(row, to);
            return true;
        }
        row -= layer.rows();
    }
    false
}
