//! The weight gradient of a dense convolution: a product whose K dimension is the output pixels.
//!
//! A tile of output pixels is one step along K. Its output gradient becomes a panel operand; the
//! input under it becomes, for each kernel column, a copy in which the two input pixels of a unit are
//! neighbours (one pixel per unit in f32). Row (ky, kx, channel) of operand A is then a pointer into
//! that copy, and walks it a pixel per unit and an image row per segment: no im2col.

use std::ops::Range;

use super::Conv2d;
use crate::gemm::{
    Interleave, KernelSet, LANES, MAX_ROWS, Tile, interleave, interleave_rows, run_rows,
};
use crate::pool::{Scratch, SharedPtr, num_threads, par_for};

/// Units along K of one tile.
const MAX_TILE_UNITS: usize = 256;
/// The copies of the input of one tile should leave room for C in L2.
const MAX_COPY_BYTES: usize = 512 * 1024;

/// Input channels of one task: more would crowd out C.
const MAX_CHANNELS: usize = 128;

/// Everything about some input channels of one group that the tasks share.
struct Plan {
    conv: Conv2d,
    inputs: usize,
    outputs: usize,
    in_offset: usize,
    out_offset: usize,
    tile: [usize; 2],
    /// Tiles of one image, down and across.
    tiles: [usize; 2],
    /// Units per tile row.
    row_units: usize,
    /// Four-byte units between neighbouring pixels of a copy.
    pixel: usize,
    /// Rows of a copy.
    copy_rows: usize,
    /// Panels as (first vector, vectors).
    panels: Vec<(usize, usize)>,
    /// A pixel's channels, all zero.
    zeros: Vec<f32>,
}

/// `grad (+)=` the gradient of one group, `[outputs, inputs, kh, kw]`.
pub(super) fn run(
    set: &KernelSet,
    conv: &Conv2d,
    group: usize,
    x: &[f32],
    grad_out: &[f32],
    grad: &mut [f32],
    accumulate: bool,
) {
    let inputs = conv.in_channels / conv.groups;
    let chunks = inputs.div_ceil(MAX_CHANNELS);
    let plans: Vec<Plan> = (0..chunks)
        .map(|i| {
            Plan::new(
                set,
                conv,
                group,
                inputs * i / chunks..inputs * (i + 1) / chunks,
            )
        })
        .collect();
    let Some(first) = plans.first() else { return };
    let (outputs, taps) = (first.outputs, conv.kernel[0] * conv.kernel[1]);
    let tiles = conv.batch * first.tiles[0] * first.tiles[1];
    // Shares of the pixels, each summed into its own copy: the result does not depend on which thread
    // was faster. Small gradients take more shares than threads, for balance.
    let per_thread = if inputs * taps * outputs <= 64 * 1024 {
        4
    } else {
        1
    };
    let shares = (num_threads() * per_thread)
        .div_ceil(chunks)
        .min(tiles)
        .max(1);
    let size = plans.iter().map(|plan| plan.inputs).max().unwrap_or(0) * taps * outputs;
    let mut copies = Scratch::take(chunks * shares * size * 4);
    let sums = SharedPtr(copies.as_mut_ptr().cast::<f32>());
    par_for(chunks * shares, |task| {
        let (plan, share) = (&plans[task / shares], task % shares);
        // SAFETY: each task owns one copy of `size` values.
        let sum = unsafe { sums.get().add(task * size) };
        let range = tiles * share / shares..tiles * (share + 1) / shares;
        if range.is_empty() {
            // SAFETY: as above.
            unsafe { sum.write_bytes(0, size) };
        }
        let start = range.start;
        for tile in range {
            // SAFETY: as above.
            unsafe { plan.add_tile(set, x, grad_out, tile, sum, tile > start) };
        }
    });
    // From [ky][kx][i][o] to [o][i][ky][kx], summing the shares, sixteen output channels at a time:
    // reads are then whole vectors, and each output channel's weights are written in order.
    let grad = SharedPtr(grad.as_mut_ptr());
    par_for(outputs.div_ceil(LANES), |part| {
        let outputs_here = part * LANES..(part * LANES + LANES).min(outputs);
        for (chunk, plan) in plans.iter().enumerate() {
            let before = plan.in_offset - group * inputs;
            for i in 0..plan.inputs {
                for tap in 0..taps {
                    let at = (tap * plan.inputs + i) * outputs + outputs_here.start;
                    let mut total = [0.0_f32; LANES];
                    for share in 0..shares {
                        // SAFETY: the task of every chunk and share wrote its copy.
                        let sum = unsafe {
                            let sum = sums.get().add((chunk * shares + share) * size + at);
                            std::slice::from_raw_parts(sum, outputs_here.len())
                        };
                        total
                            .iter_mut()
                            .zip(sum)
                            .for_each(|(total, sum)| *total += sum);
                    }
                    for (o, total) in outputs_here.clone().zip(total) {
                        // SAFETY: each output channel belongs to one part.
                        unsafe {
                            let to = grad.get().add((o * inputs + before + i) * taps + tap);
                            *to = if accumulate { *to + total } else { total };
                        }
                    }
                }
            }
        }
    });
}

impl Plan {
    /// `channels` are input channels of the group.
    fn new(set: &KernelSet, conv: &Conv2d, group: usize, channels: Range<usize>) -> Plan {
        let depth = set.unit.depth();
        let (inputs, outputs) = (channels.len(), conv.out_channels / conv.groups);
        let (height, width) = (conv.out_height(), conv.out_width());
        let [kh, kw] = conv.kernel;
        // Pixels 512 bytes apart would share few cache sets.
        let pixel = if inputs % 64 == 0 {
            inputs + LANES
        } else {
            inputs
        };
        let across = width.div_ceil(64);
        let tile_width = width.div_ceil(across);
        let row_units = tile_width.div_ceil(depth);
        let by_units = MAX_TILE_UNITS / row_units;
        let by_bytes =
            (MAX_COPY_BYTES / (row_units * pixel * 4 * kw)).saturating_sub(kh) / conv.stride + 1;
        let tile_height = by_units.min(by_bytes).clamp(1, height);
        let down = height.div_ceil(tile_height);
        let tile_height = height.div_ceil(down);
        let vectors = outputs.div_ceil(LANES);
        let count = vectors.div_ceil(set.vectors);
        let panels = (0..count)
            .map(|i| {
                let (from, to) = (vectors * i / count, vectors * (i + 1) / count);
                (from, to - from)
            })
            .collect();
        Plan {
            conv: *conv,
            inputs,
            outputs,
            in_offset: group * (conv.in_channels / conv.groups) + channels.start,
            out_offset: group * outputs,
            tile: [tile_height, tile_width],
            tiles: [height.div_ceil(tile_height), width.div_ceil(tile_width)],
            row_units,
            pixel,
            copy_rows: (tile_height - 1) * conv.stride + kh,
            panels,
            zeros: vec![0.0; inputs],
        }
    }

    /// Adds one tile to (or, for the first tile, writes it into) `sum`, `[ky][kx][i][o]`.
    ///
    /// # Safety
    /// `sum` must be valid for all values of the gradient and used by nobody else.
    unsafe fn add_tile(
        &self,
        set: &KernelSet,
        x: &[f32],
        grad_out: &[f32],
        tile: usize,
        sum: *mut f32,
        accumulate: bool,
    ) {
        let [kh, kw] = self.conv.kernel;
        let (depth, s) = (set.unit.depth(), self.conv.stride);
        let per_image = self.tiles[0] * self.tiles[1];
        let (image, place) = (tile / per_image, tile % per_image);
        let top = place / self.tiles[1] * self.tile[0];
        let left = place % self.tiles[1] * self.tile[1];
        let height = self.tile[0].min(self.conv.out_height() - top);
        let width = self.tile[1].min(self.conv.out_width() - left);
        let row_units = width.div_ceil(depth);
        let units = height * row_units;

        // Copies of the input: [kx][row][unit][pixel].
        let copy_row = self.row_units * self.pixel;
        let copy = self.copy_rows * copy_row;
        let mut copies = Scratch::take(kw * copy * 4);
        let base = copies.as_mut_ptr().cast::<u32>();
        for kx in 0..kw {
            // Output columns of this tile whose input column lies inside the image.
            let origin = left * s + kx;
            let inside = |bound: usize| bound.saturating_sub(origin).div_ceil(s).min(width);
            let from = inside(self.conv.padding);
            let to = inside(self.conv.width + self.conv.padding).max(from);
            for row in 0..(height - 1) * s + kh {
                let y = top * s + row;
                let y = y
                    .checked_sub(self.conv.padding)
                    .filter(|&y| y < self.conv.height);
                // SAFETY: the row lies inside the scratch.
                let line = unsafe { base.add(kx * copy + row * copy_row) };
                let Some(y) = y.filter(|_| from < to) else {
                    // SAFETY: as above.
                    unsafe { line.write_bytes(0, copy_row) };
                    continue;
                };
                let at = |column: usize| {
                    let col = origin + column * s - self.conv.padding;
                    let pixel = (image * self.conv.height + y) * self.conv.width + col;
                    pixel * self.conv.in_channels + self.in_offset
                };
                let whole = from.next_multiple_of(depth).min(to);
                let shape = Interleave {
                    rows: to - whole,
                    stride: s * self.conv.in_channels,
                    count: self.inputs,
                    unit_pitch: self.pixel,
                    chunk: LANES,
                    chunk_pitch: LANES,
                };
                let last = at(to - 1) + self.inputs;
                let source = &x[at(from)..last];
                // SAFETY: the source holds the pixels of columns `from..to`; units lie inside the row.
                unsafe {
                    line.write_bytes(0, from / depth * self.pixel);
                    if whole > from {
                        // An odd first column: it is the second half of its unit.
                        let unit = line.add(from / depth * self.pixel);
                        let zeros = self.zeros.as_ptr();
                        interleave(set, zeros, Some(source.as_ptr()), self.inputs, unit);
                    }
                    if whole < to {
                        let skipped = source.as_ptr().add((whole - from) * shape.stride);
                        interleave_rows(set, shape, skipped, line.add(whole / depth * self.pixel));
                    }
                    let done = to.div_ceil(depth);
                    line.add(done * self.pixel)
                        .write_bytes(0, (self.row_units - done) * self.pixel);
                }
            }
        }

        // The output gradient in panels: [panel][unit][vectors * 16].
        let panel_width = self.outputs.next_multiple_of(LANES);
        let mut packed = Scratch::take(units * panel_width * 4);
        let panels = packed.as_mut_ptr().cast::<u32>();
        for &(first, vectors) in &self.panels {
            let columns = (self.outputs - first * LANES).min(vectors * LANES);
            let shape = Interleave {
                rows: width,
                stride: self.conv.out_channels,
                count: columns,
                unit_pitch: vectors * LANES,
                chunk: LANES,
                chunk_pitch: LANES,
            };
            for row in 0..height {
                let pixel =
                    (image * self.conv.out_height() + top + row) * self.conv.out_width() + left;
                let from = pixel * self.conv.out_channels + self.out_offset + first * LANES;
                let source = &grad_out[from..from + (width - 1) * shape.stride + columns];
                // SAFETY: the source holds `width` pixels; units lie inside the scratch.
                unsafe {
                    let to = panels.add((first * units + row * row_units * vectors) * LANES);
                    interleave_rows(set, shape, source.as_ptr(), to);
                    let rest = vectors * LANES - columns;
                    for unit in 0..if rest > 0 { row_units } else { 0 } {
                        to.add(unit * vectors * LANES + columns)
                            .write_bytes(0, rest);
                    }
                }
            }
        }

        for &(first, vectors) in &self.panels {
            let columns = (self.outputs - first * LANES).min(vectors * LANES);
            for row in 0..height {
                for unit in 0..row_units {
                    let pixel = (image * self.conv.out_height() + top + row)
                        * self.conv.out_width()
                        + left
                        + unit * depth;
                    let from = pixel * self.conv.out_channels + self.out_offset + first * LANES;
                    let low = grad_out[from..from + columns].as_ptr();
                    let high = (depth == 2 && unit * depth + 1 < width).then(|| {
                        let from = from + self.conv.out_channels;
                        grad_out[from..from + columns].as_ptr()
                    });
                    // SAFETY: both sources hold `columns` values; the row lies inside the scratch.
                    unsafe {
                        let to = panels
                            .add((first * units + (row * row_units + unit) * vectors) * LANES);
                        interleave(set, low, high, columns, to);
                        to.add(columns).write_bytes(0, vectors * LANES - columns);
                    }
                }
            }
        }

        for &(first, vectors) in &self.panels {
            let column = first * LANES;
            let tile = Tile {
                a: [std::ptr::null(); MAX_ROWS],
                a_step: self.pixel * 4,
                segments: height,
                segment_units: row_units,
                a_segment_step: s * copy_row * 4,
                b: panels.wrapping_add(first * units * LANES).cast(),
                c: [std::ptr::null_mut(); MAX_ROWS],
                rows: set.rows,
                vectors,
                cols: (self.outputs - column).min(vectors * LANES),
                bias: std::ptr::null(),
                accumulate,
            };
            let inputs = self.inputs;
            // SAFETY: rows of A walk `height * row_units` units of one copy; rows of C lie in `sum`.
            unsafe {
                run_rows(set, tile, kh * kw * inputs, None, |r| {
                    let (tap, i) = (r / inputs, r % inputs);
                    let (ky, kx) = (tap / kw, tap % kw);
                    let a = base.add(kx * copy + ky * copy_row + i).cast::<u8>();
                    (a.cast_const(), sum.add(r * self.outputs + column))
                });
            }
        }
    }
}
