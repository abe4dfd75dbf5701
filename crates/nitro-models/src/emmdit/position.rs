//! E-MMDiT's two fixed tables: positions on the latent grid, and diffusion times.

use std::ops::Range;

/// Channels of the sinusoidal table of diffusion times.
pub(super) const TIME_CHANNELS: usize = 256;

/// A square 2-D sine-cosine table of positions, `size x size x channels`.
///
/// Of a position's channels the first half encodes its column, the second its row; each half is sines
/// then cosines of `coordinate / 10000^(i / (channels / 4))`. Coordinates are `f32` and angles `f64`,
/// as in the official code, since its checkpoints' tables were made that way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PositionTable {
    /// Side of the whole table (`pos_embed_max_size`).
    pub size: usize,
    /// Channels; a multiple of four.
    pub channels: usize,
    /// Side of the grid whose spacing is one over `scale`.
    pub base: usize,
    /// Divides all coordinates.
    pub scale: usize,
}

impl PositionTable {
    /// The whole table, `[size * size * channels]`.
    pub fn whole(&self) -> Vec<f32> {
        self.window(0..self.size, 0..self.size)
    }

    /// The centred `height x width` window, `[height * width * channels]`.
    pub fn centre(&self, height: usize, width: usize) -> Vec<f32> {
        let (top, left) = (self.first(height), self.first(width));
        self.window(top..top + height, left..left + width)
    }

    /// Where a centred window of `length` starts along either axis.
    pub fn first(&self, length: usize) -> usize {
        (self.size - length) / 2
    }

    fn window(&self, rows: Range<usize>, columns: Range<usize>) -> Vec<f32> {
        // The table is separable: one row of `channels / 2` per coordinate serves both axes.
        let half = self.channels / 2;
        let axis: Vec<Vec<f32>> = (0..self.size).map(|i| self.axis(i)).collect();
        let mut table = Vec::with_capacity(rows.len() * columns.len() * 2 * half);
        for row in rows {
            for column in columns.clone() {
                table.extend_from_slice(&axis[column]);
                table.extend_from_slice(&axis[row]);
            }
        }
        table
    }

    fn axis(&self, index: usize) -> Vec<f32> {
        let spacing = (self.size as f64 / self.base as f64) as f32;
        let coordinate = f64::from(index as f32 / spacing / self.scale as f32);
        let quarter = self.channels / 4;
        let angle = |i: usize| coordinate / 10000f64.powf(i as f64 / quarter as f64);
        let sines = (0..quarter).map(|i| angle(i).sin() as f32);
        let cosines = (0..quarter).map(|i| angle(i).cos() as f32);
        sines.chain(cosines).collect()
    }
}

/// The sinusoidal embedding of diffusion times, `[times, TIME_CHANNELS]`: cosines, then sines.
///
/// Frequencies and angles are rounded to `f32` where the official code rounds them: at times near
/// 1000 the last bit of an angle is visible in the model's output.
pub(super) fn time_table(times: &[f32]) -> Vec<f32> {
    let half = TIME_CHANNELS / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = -(10000f64.ln() as f32) * i as f32 / half as f32;
            f64::from(exponent).exp() as f32
        })
        .collect();
    let mut table = Vec::with_capacity(times.len() * TIME_CHANNELS);
    for &time in times {
        let angles = || {
            frequencies
                .iter()
                .map(|&frequency| f64::from(time * frequency))
        };
        table.extend(angles().map(|angle| angle.cos() as f32));
        table.extend(angles().map(|angle| angle.sin() as f32));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_before_rows_and_windows_are_centred() {
        let table = PositionTable {
            size: 8,
            channels: 8,
            base: 8,
            scale: 1,
        };
        let whole = table.whole();
        // Row 2, column 5: the lowest frequency is 1, so channel 0 is sin(column).
        let at = |row: usize, column: usize| &whole[(row * 8 + column) * 8..][..8];
        assert!((at(2, 5)[0] - 5f32.sin()).abs() < 1e-6);
        assert!((at(2, 5)[4] - 2f32.sin()).abs() < 1e-6);
        let centre = table.centre(4, 2);
        assert_eq!(&centre[..8], at(2, 3));
        assert_eq!(&centre[(3 * 2 + 1) * 8..], at(5, 4));
    }

    #[test]
    fn coordinates_are_spaced_by_the_base_grid() {
        let table = PositionTable {
            size: 96,
            channels: 8,
            base: 16,
            scale: 2,
        };
        let row = table.axis(60);
        assert!((row[0] - (60f32 / 6.0 / 2.0).sin()).abs() < 1e-6);
    }

    #[test]
    fn time_zero_has_unit_cosines_and_no_sines() {
        let table = time_table(&[0.0, 1000.0]);
        assert!(table[..128].iter().all(|&c| c == 1.0));
        assert!(table[128..256].iter().all(|&s| s == 0.0));
        assert!((table[256] - 1000f32.cos()).abs() < 1e-6);
    }
}
