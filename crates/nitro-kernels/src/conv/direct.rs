//! Dense convolution as a product that reads image rows in place.
//!
//! A tile of output pixels is one task. Its input rows are copied once, padded with zeros (and rounded
//! to bf16), into a strip of packed elements. In NHWC the values under one kernel row are a contiguous
//! run of `kw * channels` elements, so row `r` of operand A is `kh` segments of the strip starting at
//! the pixel of output `r`, and no im2col matrix is needed. The order of K is (ky, kx, channel).

use super::Conv2d;
use crate::gemm::{
    Epilogue, Finish, KernelSet, LANES, Layout, MAX_BLOCK_UNITS, MAX_ROWS, MatRef, Tile,
    convert_run, pack_b, run_rows,
};
use crate::pool::{Line, Scratch, SharedPtr, num_threads, par_for};

/// Up to here, in units, all kernel rows form one block: the panel leaves L1 for L2, but C is written
/// once.
const MAX_WHOLE_UNITS: usize = 288;
/// Strips (input rows of one task) up to this size share L2 and L3 with the panels.
const MAX_STRIP_BYTES: usize = 1 << 20;
/// Output pixels of one task.
const MAX_TILE_PIXELS: usize = 512;

/// Weights in panels, K ordered (ky, kx, channel), each kernel row padded to whole blocks.
pub(super) struct PackedDirect {
    kernel: [usize; 2],
    channels: usize,
    layout: Layout,
    lines: Vec<Line>,
    /// Units of one block, and how many blocks make a kernel row (0: all kernel rows are one block).
    block_units: usize,
    chunks: usize,
}

/// Weights as they lie in memory: `data[n * n_stride + channel * channel_stride + taps[ky * kw + kx]]`; a
/// missing tap is zero.
pub(super) struct Weights<'a> {
    pub(super) data: &'a [f32],
    pub(super) n_stride: usize,
    pub(super) channel_stride: usize,
    pub(super) taps: Vec<Option<usize>>,
}

impl PackedDirect {
    /// Packs the weights of `n` outputs.
    pub(super) fn new(
        set: &KernelSet,
        kernel: [usize; 2],
        channels: usize,
        n: usize,
        weights: &Weights<'_>,
    ) -> PackedDirect {
        let depth = set.unit.depth();
        let run_units = (kernel[1] * channels).div_ceil(depth);
        let (row_units, block_units, chunks) = if kernel[0] * run_units <= MAX_WHOLE_UNITS {
            (run_units, kernel[0] * run_units, 0)
        } else {
            let chunks = run_units.div_ceil(MAX_BLOCK_UNITS);
            let block = run_units.div_ceil(chunks);
            (block * chunks, block, chunks)
        };
        let row = row_units * depth;
        let k = kernel[0] * row;
        let mut ordered = Scratch::take(n * k * 4);
        let to = SharedPtr(ordered.as_mut_ptr().cast::<f32>());
        par_for(n.div_ceil(LANES), |part| {
            let outputs = part * LANES..(part * LANES + LANES).min(n);
            // SAFETY: each part owns the `k` values of its outputs.
            let values = unsafe {
                let start = to.get().add(outputs.start * k);
                start.write_bytes(0, outputs.len() * k);
                std::slice::from_raw_parts_mut(start, outputs.len() * k)
            };
            // Whichever of output and channel is contiguous in memory, sixteen outputs of one channel
            // share few cache lines.
            for channel in 0..channels {
                for (o, values) in outputs.clone().zip(values.chunks_exact_mut(k)) {
                    let start = o * weights.n_stride + channel * weights.channel_stride;
                    for (tap, offset) in weights.taps.iter().enumerate() {
                        if let Some(offset) = offset {
                            let at = tap / kernel[1] * row + tap % kernel[1] * channels + channel;
                            values[at] = weights.data[start + offset];
                        }
                    }
                }
            }
        });
        let layout = Layout::with_block(set, k, n, block_units);
        let mut lines = vec![Line([0; LANES]); layout.bytes().div_ceil(64)];
        // SAFETY: all `n * k` values were written above.
        let ordered = unsafe { std::slice::from_raw_parts(to.get(), n * k) };
        if let Ok(view) = MatRef::row_major(ordered, n, k) {
            // SAFETY: the lines hold `layout.bytes()` bytes.
            unsafe { pack_b(set, &layout, &view.t(), lines.as_mut_ptr().cast()) };
        }
        PackedDirect {
            kernel,
            channels,
            layout,
            lines,
            block_units,
            chunks,
        }
    }
}

/// Where a dense correlation reads and writes. Offsets and strides are in elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direct {
    pub(super) batch: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    /// Elements between neighbouring input pixels, and to the first channel read.
    pub(super) pixel: usize,
    pub(super) offset: usize,
    pub(super) stride: usize,
    /// Zero rows above and zero columns left of the image (negative: rows and columns skipped).
    pub(super) pad_top: isize,
    pub(super) pad_left: isize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
    pub(super) out_offset: usize,
    pub(super) out_pixel: usize,
    pub(super) out_row: usize,
    pub(super) out_image: usize,
}

impl Direct {
    /// The forward pass of one group of `conv`.
    pub(super) fn forward(conv: &Conv2d, group: usize, inputs: usize, outputs: usize) -> Direct {
        let (out_height, out_width) = (conv.out_height(), conv.out_width());
        let out_row = out_width * conv.out_channels;
        Direct {
            batch: conv.batch,
            height: conv.height,
            width: conv.width,
            pixel: conv.in_channels,
            offset: group * inputs,
            stride: conv.stride,
            pad_top: conv.padding as isize,
            pad_left: conv.padding as isize,
            out_height,
            out_width,
            out_offset: group * outputs,
            out_pixel: conv.out_channels,
            out_row,
            out_image: out_height * out_row,
        }
    }

    /// Runs the correlation. The caller has checked that `x` and `out` hold what the fields reach.
    pub(super) fn run(
        &self,
        set: &KernelSet,
        weights: &PackedDirect,
        x: &[f32],
        out: &mut [f32],
        accumulate: bool,
        epilogue: Epilogue<'_>,
    ) {
        if self.batch * self.out_height * self.out_width == 0 || weights.layout.n == 0 {
            return;
        }
        let [kh, kw] = weights.kernel;
        let element = set.unit.element_bytes();
        let channels = weights.channels;
        let threads = num_threads();

        // The tile: as wide as the image up to 64 pixels, then as high as the budgets allow, but low
        // enough that every thread gets two tiles.
        let across = self.out_width.div_ceil(64);
        let tile_width = self.out_width.div_ceil(across);
        let row_bytes = ((tile_width - 1) * self.stride + kw) * channels * element;
        let fits = (MAX_STRIP_BYTES / row_bytes).saturating_sub(kh) / self.stride + 1;
        let high = fits
            .min(MAX_TILE_PIXELS / tile_width)
            .clamp(1, self.out_height);
        let wanted = (2 * threads).div_ceil(self.batch * across);
        let down = self
            .out_height
            .div_ceil(high)
            .max(wanted.min(self.out_height));
        let tile_height = self.out_height.div_ceil(down);
        let down = self.out_height.div_ceil(tile_height);
        let tiles = self.batch * down * across;
        let panels = weights.layout.panels();
        let panel_parts = threads.div_ceil(tiles).min(panels);

        let shape = Strip {
            rows: (tile_height - 1) * self.stride + kh,
            cols: (tile_width - 1) * self.stride + kw,
            // Rows end in zeros: a run of odd length, or padded to whole blocks, reads beyond them.
            pitch: (row_bytes + element).next_multiple_of(64) + 64,
            slack: weights.block_units * 4 + 64,
        };
        let bias = SharedPtr(
            epilogue
                .bias
                .map_or(std::ptr::null_mut(), |b| b.as_ptr().cast_mut()),
        );
        let activation = epilogue.activation;
        let pre = epilogue
            .pre_activation
            .map_or(std::ptr::null_mut(), |p| p.as_mut_ptr());
        let (out, pre) = (SharedPtr(out.as_mut_ptr()), SharedPtr(pre));
        par_for(tiles * panel_parts, |task| {
            let (tile, part) = (task / panel_parts, task % panel_parts);
            let (image, place) = (tile / (down * across), tile % (down * across));
            let (top, left) = (place / across * tile_height, place % across * tile_width);
            let height = tile_height.min(self.out_height - top);
            let width = tile_width.min(self.out_width - left);
            let mut strip = Scratch::take(shape.bytes());
            let base = strip.as_mut_ptr();
            // SAFETY: the scratch holds `shape.bytes()` bytes.
            unsafe { self.fill(set, channels, x, image, top, left, &shape, base) };

            let first_output = self.out_offset
                + image * self.out_image
                + top * self.out_row
                + left * self.out_pixel;
            let pixel_bytes = self.stride * channels * element;
            let row_bytes = self.stride * shape.pitch;
            let mut rows = [(0_usize, 0_usize); MAX_TILE_PIXELS];
            let pixels = height * width;
            for (i, row) in rows[..pixels].iter_mut().enumerate() {
                let (y, x) = (i / width, i % width);
                let output = first_output + y * self.out_row + x * self.out_pixel;
                *row = (y * row_bytes + x * pixel_bytes, output);
            }
            let layout = &weights.layout;
            for block in 0..layout.blocks() {
                let (segments, segment_units, start) = match weights.chunks {
                    0 => (kh, weights.block_units / kh, 0),
                    chunks => {
                        let (ky, chunk) = (block / chunks, block % chunks);
                        let start = ky * shape.pitch + chunk * weights.block_units * 4;
                        (1, weights.block_units, start)
                    }
                };
                let finish = (block + 1 == layout.blocks()).then_some(Finish {
                    activation,
                    c: out.get(),
                    pre_activation: pre.get(),
                });
                for panel in panels * part / panel_parts..panels * (part + 1) / panel_parts {
                    let (first, vectors) = layout.panel(panel);
                    let column = first * LANES;
                    let has_bias = block == 0 && !bias.get().is_null();
                    let tile = Tile {
                        a: [std::ptr::null(); MAX_ROWS],
                        a_step: 4,
                        segments,
                        segment_units,
                        a_segment_step: shape.pitch,
                        // In range: the panel lies inside the packed weights.
                        b: weights
                            .lines
                            .as_ptr()
                            .cast::<f32>()
                            .wrapping_add(layout.offset(block, first)),
                        c: [std::ptr::null_mut(); MAX_ROWS],
                        rows: set.rows,
                        vectors,
                        cols: (layout.n - column).min(vectors * LANES),
                        bias: if has_bias {
                            bias.get().wrapping_add(column)
                        } else {
                            std::ptr::null()
                        },
                        accumulate: accumulate || block > 0,
                    };
                    // SAFETY: strip rows reach `segments` rows of runs plus the zeroed slack; output
                    // pixels hold `n` values from `column` and belong to this task alone.
                    unsafe {
                        run_rows(set, tile, pixels, finish, |i| {
                            let (a, c) = rows[i];
                            (base.add(start + a).cast_const(), out.get().add(c + column))
                        });
                    }
                }
            }
        });
    }

    /// Copies the input under a tile into the strip, with zeros outside the image.
    ///
    /// # Safety
    /// `base` must be valid for `shape.bytes()` bytes.
    unsafe fn fill(
        &self,
        set: &KernelSet,
        channels: usize,
        x: &[f32],
        image: usize,
        top: usize,
        left: usize,
        shape: &Strip,
        base: *mut u8,
    ) {
        let element = set.unit.element_bytes();
        let first_row = (top * self.stride) as isize - self.pad_top;
        let first_col = (left * self.stride) as isize - self.pad_left;
        // Columns of the strip that lie inside the image.
        let from = (-first_col).clamp(0, shape.cols as isize) as usize;
        let to =
            (self.width as isize - first_col).clamp(from as isize, shape.cols as isize) as usize;
        for row in 0..shape.rows {
            // SAFETY: row `row` of the strip is `pitch` bytes of the scratch; runs end inside it.
            unsafe {
                let line = base.add(row * shape.pitch);
                let y = first_row + row as isize;
                if y < 0 || y >= self.height as isize || from >= to {
                    line.write_bytes(0, shape.pitch);
                    continue;
                }
                let size = channels * element;
                line.write_bytes(0, from * size);
                let pixel = (image * self.height + y as usize) * self.width
                    + (first_col + from as isize) as usize;
                let source = &x[pixel * self.pixel + self.offset..];
                if self.pixel == channels {
                    convert_run(
                        set,
                        &source[..(to - from) * channels],
                        line.add(from * size),
                    );
                } else {
                    for col in from..to {
                        let run = &source[(col - from) * self.pixel..][..channels];
                        convert_run(set, run, line.add(col * size));
                    }
                }
                line.add(to * size).write_bytes(0, shape.pitch - to * size);
            }
        }
        // SAFETY: the slack lies behind the rows.
        unsafe {
            base.add(shape.rows * shape.pitch)
                .write_bytes(0, shape.slack)
        };
    }
}

/// The sizes of a strip, in rows, columns and bytes.
struct Strip {
    rows: usize,
    cols: usize,
    pitch: usize,
    slack: usize,
}

impl Strip {
    fn bytes(&self) -> usize {
        self.rows * self.pitch + self.slack
    }
}

/// The input gradient of one group: for each of `stride x stride` phases of input pixels, a stride-1
/// correlation of the output gradient with the kernel taps that reach this phase, flipped.
pub(super) fn backward_input(
    set: &KernelSet,
    conv: &Conv2d,
    group: usize,
    weight: &[f32],
    grad_out: &[f32],
    grad_x: &mut [f32],
) {
    let (inputs, outputs) = (
        conv.in_channels / conv.groups,
        conv.out_channels / conv.groups,
    );
    let [kh, kw] = conv.kernel;
    let s = conv.stride;
    let out_row = conv.width * conv.in_channels;
    for row in 0..s.min(conv.height) {
        for col in 0..s.min(conv.width) {
            let (y, x) = (Phase::new(row, kh, conv), Phase::new(col, kw, conv));
            let direct = Direct {
                batch: conv.batch,
                height: conv.out_height(),
                width: conv.out_width(),
                pixel: conv.out_channels,
                offset: group * outputs,
                stride: 1,
                pad_top: y.padding,
                pad_left: x.padding,
                out_height: (conv.height - row).div_ceil(s),
                out_width: (conv.width - col).div_ceil(s),
                out_offset: (row * conv.width + col) * conv.in_channels + group * inputs,
                out_pixel: s * conv.in_channels,
                out_row: s * out_row,
                out_image: conv.height * out_row,
            };
            // With no taps at all (stride beyond the kernel), one zero tap writes the zeros.
            let taps = [y.taps.max(1), x.taps.max(1)];
            let flipped = (0..taps[0] * taps[1])
                .map(|j| Some(y.tap(j / taps[1], s)? * kw + x.tap(j % taps[1], s)?))
                .collect();
            let weights = Weights {
                data: weight,
                n_stride: kh * kw,
                channel_stride: inputs * kh * kw,
                taps: flipped,
            };
            let weights = PackedDirect::new(set, taps, outputs, inputs, &weights);
            direct.run(set, &weights, grad_out, grad_x, false, Epilogue::default());
        }
    }
}

/// Along one axis: the kernel taps that reach input positions congruent to `phase` modulo the stride.
struct Phase {
    first: usize,
    taps: usize,
    padding: isize,
}

impl Phase {
    fn new(phase: usize, kernel: usize, conv: &Conv2d) -> Phase {
        let s = conv.stride;
        // Position phase + s q receives output (phase + padding - k) / s + q through tap k.
        let first = (phase + conv.padding) % s;
        let shift = (phase + conv.padding - first) / s;
        let taps = kernel.saturating_sub(first).div_ceil(s);
        Phase {
            first,
            taps,
            padding: taps.max(1) as isize - 1 - shift as isize,
        }
    }

    /// The original tap at flipped position `j`.
    fn tap(&self, j: usize, stride: usize) -> Option<usize> {
        (j < self.taps).then(|| self.first + stride * (self.taps - 1 - j))
    }
}
