//! Weights in transformed form, in panels of up to 48 outputs.

use super::form::{Form, MAX_SIDE};
use crate::packed::PackedBytes;
use crate::packed::memory::Piece;
use crate::pool::{Scratch, SharedPtr, par_for};

/// Output channels in a vector of packed weights, whatever the register width.
pub(super) const LANES: usize = 16;
/// The most vectors of a panel.
pub(super) const MAX_VECTORS: usize = 3;

/// What the norms of both factors of a 16-bit product are scaled to, at most. By the Cauchy-Schwarz
/// inequality no 32-bit sum can then overflow: `(32000 + 32) (66000 + 32) < 2^31`, where 32 is more
/// than rounding adds for up to 4096 channels. No scaled input exceeds 32000, and weights are held
/// to 16 bits separately.
pub(super) const INPUT_NORM: f32 = 32_000.0;
const WEIGHT_NORM: f32 = 66_000.0;
/// The most input channels for which [`INPUT_NORM`] leaves room for rounding.
pub(super) const MAX_INT16_CHANNELS: usize = 4096;

/// Transformed weights: `[panel][point][unit][vectors * 16]`, four bytes per entry. A unit is one
/// input channel in f32, or two as 16-bit integers, which their steps follow.
pub(super) struct Weights {
    bytes: PackedBytes,
    /// Vectors of outputs.
    vectors: usize,
    /// Units of one point and output.
    units: usize,
    points: usize,
    int16: bool,
}

/// Some consecutive vectors of outputs.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) first: usize,
    pub(super) vectors: usize,
}

impl Weights {
    /// None yet, of a form that evaluates `points` points.
    pub(super) fn empty(points: usize, [outputs, inputs]: [usize; 2], int16: bool) -> Self {
        Self {
            bytes: PackedBytes::default(),
            vectors: outputs.div_ceil(LANES),
            units: if int16 { inputs.div_ceil(2) } else { inputs },
            points,
            int16,
        }
    }

    /// These, with `bytes` of the right length.
    pub(super) fn with_bytes(self, bytes: PackedBytes) -> Self {
        Self { bytes, ..self }
    }

    /// Transforms `weight` (`[outputs, inputs, 3, 3]`).
    pub(super) fn pack<F: Form>(
        &self,
        weight: &[f32],
        [outputs, inputs]: [usize; 2],
    ) -> PackedBytes {
        let Self {
            vectors,
            units,
            points,
            int16,
            ..
        } = *self;
        let mut piece = Piece::new(self.len());
        let start = piece.as_mut_ptr();
        let entries = SharedPtr(start.cast::<u32>());
        let steps = SharedPtr(start.wrapping_add(self.entries_len()).cast::<f32>());
        par_for(self.panels(), |panel| {
            let panel = self.panel(panel);
            let width = panel.vectors * LANES;
            let columns = panel.first * LANES..((panel.first + panel.vectors) * LANES).min(outputs);
            let mut scratch = Scratch::take(points * inputs * width * 4);
            // SAFETY: the scratch holds as many values, of which every bit pattern is one.
            let values = unsafe {
                let start = scratch.as_mut_ptr().cast::<f32>();
                start.write_bytes(0, points * inputs * width);
                std::slice::from_raw_parts_mut(start, points * inputs * width)
            }; // [point][input][output]
            for (column, output) in columns.enumerate() {
                let taps = &weight[output * inputs * 9..][..inputs * 9];
                for (input, taps) in taps.chunks_exact(9).enumerate() {
                    let at = input * width + column;
                    for (point, value) in transform::<F>(taps).into_iter().take(points).enumerate()
                    {
                        values[point * inputs * width + at] = value;
                    }
                }
            }
            // SAFETY: each panel owns its entries and steps.
            let target = unsafe {
                let from = entries.get().add(panel.first * points * units * LANES);
                std::slice::from_raw_parts_mut(from, panel.vectors * points * units * LANES)
            };
            if !int16 {
                for (to, value) in target.iter_mut().zip(values.iter()) {
                    *to = value.to_bits();
                }
                return;
            }
            for point in 0..points {
                let values = &values[point * inputs * width..][..inputs * width];
                let target = &mut target[point * units * width..][..units * width];
                // SAFETY: as above.
                let steps = unsafe {
                    let from = steps.get().add((point * vectors + panel.first) * LANES);
                    std::slice::from_raw_parts_mut(from, width)
                };
                quantise(values, width, target, steps);
            }
        });
        piece.freeze()
    }

    pub(super) fn panels(&self) -> usize {
        self.vectors.div_ceil(MAX_VECTORS)
    }

    /// Panel `index`; their widths differ by at most one vector.
    pub(super) fn panel(&self, index: usize) -> Panel {
        let first = self.vectors * index / self.panels();
        Panel {
            first,
            vectors: self.vectors * (index + 1) / self.panels() - first,
        }
    }

    /// The weights of one point and panel, 16 entries of four bytes after the other.
    pub(super) fn of(&self, panel: Panel, point: usize) -> &[[u32; LANES]] {
        let count = panel.vectors * self.units;
        let at = panel.first * self.points * self.units + point * count;
        assert!((at + count) * LANES * 4 <= self.bytes.len());
        // SAFETY: the bytes hold that much, aligned to cache lines.
        unsafe {
            let entries = self.bytes.as_ptr().cast::<[u32; LANES]>();
            std::slice::from_raw_parts(entries.add(at), count)
        }
    }

    /// Vectors of outputs.
    pub(super) fn vectors(&self) -> usize {
        self.vectors
    }

    /// Units of one point and output.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn units(&self) -> usize {
        self.units
    }

    /// For integers: `[point][vectors * 16]`, what one step of a weight is worth.
    pub(super) fn steps(&self) -> &[f32] {
        self.bytes.numbers(self.entries_len(), self.steps_count())
    }

    fn steps_count(&self) -> usize {
        if self.int16 {
            self.points * self.vectors * LANES
        } else {
            0
        }
    }

    fn entries_len(&self) -> usize {
        self.vectors * self.points * self.units * LANES * 4
    }

    /// Bytes that all take.
    pub(super) fn len(&self) -> usize {
        self.entries_len() + self.steps_count() * 4
    }

    pub(super) fn bytes(&self) -> &PackedBytes {
        &self.bytes
    }
}

/// Both directions of the tap transform.
fn transform<F: Form>(taps: &[f32]) -> [f32; MAX_SIDE * MAX_SIDE] {
    let tap = |at: usize| f64::from(taps[at]);
    let rows: [[f64; MAX_SIDE]; 3] =
        std::array::from_fn(|y| F::taps([tap(3 * y), tap(3 * y + 1), tap(3 * y + 2)]));
    let mut values = [0.0; MAX_SIDE * MAX_SIDE];
    for x in 0..F::SIDE {
        let column = F::taps([rows[0][x], rows[1][x], rows[2][x]]);
        for y in 0..F::SIDE {
            values[y * F::SIDE + x] = column[y] as f32;
        }
    }
    values
}

/// Columns of `values` (`[input][width]`) as 16-bit integers, pairs of inputs in one unit.
fn quantise(values: &[f32], width: usize, target: &mut [u32], steps: &mut [f32]) {
    for (column, step) in steps.iter_mut().enumerate() {
        let column_values = || values[column..].iter().step_by(width);
        let norm = column_values()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt();
        let largest = column_values().fold(0.0_f32, |most, v| most.max(v.abs()));
        let scale = (WEIGHT_NORM / norm as f32).min(32_767.0 / largest);
        // A column of zeros stays one.
        let scale = if scale.is_finite() { scale } else { 0.0 };
        *step = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (i, value) in column_values().enumerate() {
            let value = (value * scale).round_ties_even() as i16;
            let half = u32::from(value as u16) << (16 * (i % 2));
            target[i / 2 * width + column] |= half;
        }
    }
}
