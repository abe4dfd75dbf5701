//! The left-hand side of a product with packed weights: rows in the units the micro-kernels read.

use super::sink::Lines;
use crate::gemm::{KernelSet, convert_run};
use crate::isa::multiversion;
use crate::pool::{Scratch, SharedPtr};

/// In what form rows (and weights) lie in memory. All are read in units of four bytes along K.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// As the float kernels of a set read them: f32, or pairs of bf16.
    Float,
    /// Four 8-bit integers per unit.
    Int8,
}

impl Format {
    /// Elements along K in a unit.
    pub(crate) fn depth(self, set: &KernelSet) -> usize {
        match self {
            Format::Float => set.unit.depth(),
            Format::Int8 => 4,
        }
    }
}

/// Rows of activations, shared by the threads of a product. Contents are written by tasks.
pub(crate) struct Activations {
    pub(crate) set: KernelSet,
    pub(crate) format: Format,
    /// Elements of a row.
    pub(crate) k: usize,
    /// Bytes between rows.
    pub(crate) pitch: usize,
    base: SharedPtr<u8>,
    /// One scale per row (integers only).
    scales: SharedPtr<f32>,
    _memory: Scratch,
}

impl Activations {
    /// Room for `rows` rows of `k` elements.
    pub(crate) fn take(set: &KernelSet, format: Format, rows: usize, k: usize) -> Self {
        let units = k.div_ceil(format.depth(set));
        // Whole cache lines and one more: rows whole pages apart would share cache sets.
        let pitch = (units * 4).next_multiple_of(64) + 64;
        let bytes = rows * pitch;
        let mut memory = Scratch::take(bytes + rows * 4);
        let base = memory.as_mut_ptr();
        if !k.is_multiple_of(format.depth(set)) {
            for row in 0..rows {
                // SAFETY: the last unit of a row lies inside the scratch. Its surplus elements stay
                // zero: writers write the row's own elements only.
                unsafe { base.add(row * pitch + units * 4 - 4).cast::<u32>().write(0) };
            }
        }
        Activations {
            set: *set,
            format,
            k,
            pitch,
            base: SharedPtr(base),
            scales: SharedPtr(base.wrapping_add(bytes).cast()),
            _memory: memory,
        }
    }

    pub(crate) fn row(&self, row: usize) -> *mut u8 {
        self.base.get().wrapping_add(row * self.pitch)
    }

    /// The scale of row `row`, to be read when the row is complete.
    pub(crate) fn scale(&self, row: usize) -> *mut f32 {
        self.scales.get().wrapping_add(row)
    }

    /// Writes a whole row from f32.
    ///
    /// # Safety
    /// The row must be within those taken, and nobody else may access it meanwhile.
    pub(crate) unsafe fn write_row(&self, row: usize, values: &[f32]) {
        debug_assert_eq!(values.len(), self.k);
        // SAFETY: the row holds `k` elements and has one scale; the caller owns both.
        unsafe {
            match self.format {
                Format::Float => convert_run(&self.set, values, self.row(row)),
                Format::Int8 => {
                    let target = std::slice::from_raw_parts_mut(self.row(row), values.len());
                    let mut scale = 0.0;
                    quantize_row(self.set.isa, values, target, &mut scale);
                    *self.scale(row) = scale;
                }
            }
        }
    }

    /// Writes the elements `at..` of a row (float formats only).
    ///
    /// # Safety
    /// As [`Activations::write_row`], for these elements.
    pub(crate) unsafe fn write_part(&self, row: usize, at: usize, values: &[f32]) {
        debug_assert!(self.format == Format::Float && at + values.len() <= self.k);
        let bytes = at * self.set.unit.element_bytes();
        // SAFETY: the elements lie in the row, which the caller owns.
        unsafe { convert_run(&self.set, values, self.row(row).add(bytes)) };
    }
}

impl Activations {
    /// Writes the elements `at..` of the rows `first..` (float formats only).
    ///
    /// # Safety
    /// As [`Activations::write_row`], for these elements; the lines must be valid.
    pub(super) unsafe fn write_parts(&self, first: usize, at: usize, values: &Lines) {
        debug_assert!(self.format == Format::Float && at + values.columns <= self.k);
        let bytes = at * self.set.unit.element_bytes();
        for row in 0..values.rows {
            // SAFETY: the caller's contract.
            unsafe {
                let from = values.first.add(row * values.pitch).cast_const();
                let from = std::slice::from_raw_parts(from, values.columns);
                convert_run(&self.set, from, self.row(first + row).add(bytes));
            }
        }
    }
}

/// Adding it leaves an integer plus [`ZERO`] in the low byte of an f32 of magnitude below 2^22.
const ROUND: f32 = 12_582_912.0 + ZERO;
/// What stands for zero in an activation's bytes, which the dot-product instruction reads unsigned.
pub(crate) const ZERO: f32 = 128.0;

#[inline(always)]
fn quantize<const FUSED: bool>(values: &[f32], target: &mut [u8], scale: &mut f32) {
    const LANES: usize = 32;
    let mut largest = [0.0_f32; LANES];
    // Zero, or NaN if a value is not finite: a diverging run must be noticed.
    let mut broken = [0.0_f32; LANES];
    let chunks = values.chunks_exact(LANES);
    for (i, x) in chunks.remainder().iter().enumerate() {
        largest[i] = x.abs();
        broken[i] = x * 0.0;
    }
    for chunk in chunks {
        for (largest, x) in largest.iter_mut().zip(chunk) {
            *largest = if x.abs() > *largest {
                x.abs()
            } else {
                *largest
            };
        }
        for (broken, x) in broken.iter_mut().zip(chunk) {
            *broken += x * 0.0;
        }
    }
    let largest = largest.iter().fold(0.0_f32, |a, &b| a.max(b));
    *scale = largest / 127.0 + broken.iter().sum::<f32>();
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (target, x) in target.iter_mut().zip(values) {
        *target = (x * inverse + ROUND).to_bits() as u8;
    }
}

multiversion! {
    /// Quantises a row: `x` is about `scale * (byte - 128)`, bytes from 1 to 255.
    pub(super) fn quantize_row = quantize(values: &[f32], target: &mut [u8], scale: &mut f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, Precision};
    use crate::testing::random;

    #[test]
    fn quantised_rows_are_within_half_a_step() {
        for isa in Isa::supported() {
            let set = KernelSet::new(isa, Precision::Int8);
            for k in [1, 31, 32, 77, 768] {
                let rows = Activations::take(&set, Format::Int8, 3, k);
                let values = random(k as u64, k);
                // SAFETY: row 1 of three, used by this thread alone.
                unsafe { rows.write_row(1, &values) };
                // SAFETY: the row was just written.
                let (scale, bytes) = unsafe {
                    (
                        *rows.scale(1),
                        std::slice::from_raw_parts(rows.row(1).cast_const(), k),
                    )
                };
                for (&x, &byte) in values.iter().zip(bytes) {
                    let back = (f32::from(byte) - ZERO) * scale;
                    assert!((back - x).abs() <= 0.5001 * scale, "{isa:?} {k} {x} {back}");
                }
            }
            let rows = Activations::take(&set, Format::Int8, 1, 5);
            // SAFETY: the only row.
            unsafe {
                rows.write_row(0, &[0.0; 5]);
                assert_eq!(*rows.scale(0), 0.0);
                assert_eq!(*rows.row(0), 128);
            }
        }
    }
}
