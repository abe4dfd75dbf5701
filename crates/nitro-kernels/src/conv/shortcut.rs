//! Shortcuts between resolutions, for some rows of a channel-last image.

use std::ops::Range;

use super::winograd::ImageRows;
use crate::pool::{SharedPtr, par_for};

/// Calls `f(row, values)` for the rows of `out`, in parallel.
fn for_rows(out: &mut [f32], rows: Range<usize>, f: impl Fn(usize, &mut [f32]) + Sync) {
    let Some(len) = out.len().checked_div(rows.len()) else {
        return;
    };
    let out = SharedPtr(out.as_mut_ptr());
    par_for(rows.len(), |i| {
        // SAFETY: `out` holds as many rows of `len` values, each of which is one task's.
        let values = unsafe { std::slice::from_raw_parts_mut(out.get().add(i * len), len) };
        f(rows.start + i, values);
    });
}

/// Output rows `rows` of `pixel_shuffle(repeat_interleave(x, 4 outputs / inputs), 2)`: twice the height
/// and width. Channel `c` at offset `(dy, dx)` of a block is input channel
/// `(4 c + 2 dy + dx) inputs / (4 outputs)`.
pub(super) fn repeated(
    width: usize,
    [inputs, outputs]: [usize; 2],
    x: ImageRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let copies = 4 * outputs / inputs;
    for_rows(out, rows, |row, out| {
        let line = &x.data[(row / 2 - x.first) * width * inputs..][..width * inputs];
        for (at, out) in out.chunks_exact_mut(outputs).enumerate() {
            let pixel = &line[at / 2 * inputs..][..inputs];
            let offset = 2 * (row % 2) + at % 2;
            match copies {
                4 => out.copy_from_slice(pixel),
                2 => {
                    for (out, pair) in out.iter_mut().zip(pixel.as_chunks::<2>().0) {
                        *out = pair[row % 2];
                    }
                }
                _ => {
                    for (c, out) in out.iter_mut().enumerate() {
                        *out = pixel[(4 * c + offset) / copies];
                    }
                }
            }
        }
    });
}

/// Output rows `rows` of the means of runs of `4 inputs / outputs` channels of `pixel_unshuffle(x, 2)`:
/// half the height and width.
pub(super) fn averaged(
    width: usize,
    [inputs, outputs]: [usize; 2],
    x: ImageRows<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let group = 4 * inputs / outputs;
    let row_len = width * inputs;
    for_rows(out, rows, |row, out| {
        let lines = &x.data[(2 * row - x.first) * row_len..][..2 * row_len];
        let (upper, lower) = lines.split_at(row_len);
        for (at, out) in out.chunks_exact_mut(outputs).enumerate() {
            let pixel = |line: &'_ [f32], dx: usize| {
                let from = (2 * at + dx) * inputs;
                from..from + inputs.min(line.len() - from)
            };
            let block = [
                &upper[pixel(upper, 0)],
                &upper[pixel(upper, 1)],
                &lower[pixel(lower, 0)],
                &lower[pixel(lower, 1)],
            ];
            if group == 4 {
                for (c, out) in out.iter_mut().enumerate() {
                    *out = 0.25 * ((block[0][c] + block[1][c]) + (block[2][c] + block[3][c]));
                }
                continue;
            }
            for (c, out) in out.iter_mut().enumerate() {
                let members = c * group..(c + 1) * group;
                let sum: f32 = members.map(|k| block[k % 4][k / 4]).sum();
                *out = sum / group as f32;
            }
        }
    });
}
