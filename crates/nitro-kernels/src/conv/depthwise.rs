//! Depthwise convolution: one kernel per channel, vectorised over channels, always in f32 (it is bound
//! by memory, not by arithmetic).
//!
//! Weights are reordered to `[ky][kx][channel]`.

use super::Conv2d;
use crate::gemm::{Activation, Epilogue, LANES, apply_with_isa, fma};
use crate::isa::{Isa, multiversion};
use crate::pool::{Scratch, SharedPtr, num_threads, par_for};

/// Output pixels computed together, so that each weight vector is loaded once for all.
const PIXELS: usize = 4;

/// Channels and output rows of one task; channels are whole vectors.
const BLOCK_CHANNELS: usize = 8 * LANES;
const BLOCK_ROWS: usize = 16;
/// Output pixels whose weight gradient is summed before the next channels are read.
const BLOCK_PIXELS: usize = 16;

/// `[C, 1, kh, kw]` to `[kh][kw][C]`.
pub(super) fn reorder(conv: &Conv2d, weight: &[f32]) -> Vec<f32> {
    let (channels, taps) = (conv.in_channels, conv.kernel[0] * conv.kernel[1]);
    let mut ordered = vec![0.0; channels * taps];
    for (tap, values) in ordered.chunks_exact_mut(channels).enumerate() {
        for (c, value) in values.iter_mut().enumerate() {
            *value = weight[c * taps + tap];
        }
    }
    ordered
}

/// As [`reorder`], with the kernel turned by 180 degrees.
pub(super) fn reorder_flipped(conv: &Conv2d, weight: &[f32]) -> Vec<f32> {
    let (channels, taps) = (conv.in_channels, conv.kernel[0] * conv.kernel[1]);
    let mut ordered = vec![0.0; channels * taps];
    for (tap, values) in ordered.chunks_exact_mut(channels).enumerate() {
        for (c, value) in values.iter_mut().enumerate() {
            *value = weight[c * taps + taps - 1 - tap];
        }
    }
    ordered
}

/// Input positions `out * stride + tap - padding` that exist, for one output position: the range of
/// taps. Empty if none does.
#[inline(always)]
fn valid_taps(
    out: usize,
    size: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
) -> std::ops::Range<usize> {
    let origin = out * stride;
    let from = padding.saturating_sub(origin).min(kernel);
    let to = (size + padding).saturating_sub(origin).min(kernel);
    from..to.max(from)
}

/// The forward pass; `weights` as [`reorder`] gives them.
pub(super) fn forward(
    isa: Isa,
    conv: &Conv2d,
    weights: &[f32],
    x: &[f32],
    out: &mut [f32],
    accumulate: bool,
    epilogue: Epilogue<'_>,
) {
    let Epilogue {
        bias,
        activation,
        pre_activation,
    } = epilogue;
    let channels = conv.out_channels;
    let row_len = conv.out_width() * channels;
    let out_height = conv.out_height();
    let pre = SharedPtr(pre_activation.map_or(std::ptr::null_mut(), |p| p.as_mut_ptr()));
    let out = SharedPtr(out.as_mut_ptr());
    // Blocks of channels and rows, so that the input rows a block reads again stay in L2.
    let parts = channels.div_ceil(BLOCK_CHANNELS);
    let blocks = out_height.div_ceil(BLOCK_ROWS);
    par_for(conv.batch * blocks * parts, |task| {
        let (image, place) = (task / (blocks * parts), task % (blocks * parts));
        let (block, part) = (place / parts, place % parts);
        let image_len = conv.height * conv.width * channels;
        let x = &x[image * image_len..][..image_len];
        let range = part * BLOCK_CHANNELS..((part + 1) * BLOCK_CHANNELS).min(channels);
        for y in block * BLOCK_ROWS..((block + 1) * BLOCK_ROWS).min(out_height) {
            // SAFETY: the caller checked the length of the output; each task writes only its own
            // channels of its own rows.
            let row = unsafe { out.get().add((image * out_height + y) * row_len) };
            let target = Row {
                values: row,
                channels: range.clone(),
                accumulate,
            };
            forward_row(isa, conv, weights, bias, x, y, &target);
            for pixel in 0..conv.out_width() {
                let at = pixel * channels + range.start;
                // SAFETY: as above; the pre-activation buffer has the output's length.
                unsafe {
                    if !pre.get().is_null() {
                        let pre = pre.get().add((image * out_height + y) * row_len + at);
                        std::ptr::copy_nonoverlapping(row.add(at), pre, range.len());
                    }
                    if activation != Activation::None {
                        let values = std::slice::from_raw_parts_mut(row.add(at), range.len());
                        apply_with_isa(isa, activation, values);
                    }
                }
            }
        }
    });
}

/// Some channels of an output row.
struct Row {
    values: *mut f32,
    channels: std::ops::Range<usize>,
    accumulate: bool,
}

impl Row {
    /// Stores or adds `sums` at `at`, which the owner of the row keeps inside its channels.
    #[inline(always)]
    fn put(&self, at: usize, sums: &[f32]) {
        // SAFETY: `at` lies in the row and in the channels owned by the task.
        let to = unsafe { std::slice::from_raw_parts_mut(self.values.add(at), sums.len()) };
        if self.accumulate {
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
        } else {
            to.copy_from_slice(sums);
        }
    }
}

multiversion! {
    /// One output row.
    fn forward_row = forward_row_body(
        conv: &Conv2d,
        weights: &[f32],
        bias: Option<&[f32]>,
        x: &[f32],
        y: usize,
        row: &Row,
    )
}

#[inline(always)]
fn forward_row_body<const FUSED: bool>(
    conv: &Conv2d,
    weights: &[f32],
    bias: Option<&[f32]>,
    x: &[f32],
    y: usize,
    row: &Row,
) {
    let (channels, width, s) = (conv.in_channels, conv.width, conv.stride);
    let [kh, kw] = conv.kernel;
    let taps_y = valid_taps(y, conv.height, kh, s, conv.padding);
    let out_width = conv.out_width();
    // Outputs whose taps all lie inside the row.
    let inner_from = conv.padding.div_ceil(s).min(out_width);
    let inner_to = match (width + conv.padding).checked_sub(kw) {
        Some(last) => (last / s + 1).clamp(inner_from, out_width),
        None => inner_from,
    };
    let whole =
        row.channels.start..row.channels.end - (row.channels.end - row.channels.start) % LANES;
    // Pixels outside, channels inside: memory is then read in order.
    let mut at = 0;
    while at < out_width {
        if at >= inner_from && at + PIXELS <= inner_to {
            // The lowest input row is new; fetch what the pixels after the next ones will read.
            let lowest = (y * s + taps_y.end).saturating_sub(conv.padding + 1) * width;
            let ahead = lowest + (at + 2 * PIXELS) * s;
            for c in whole.clone().step_by(LANES) {
                for p in 0..PIXELS * s {
                    prefetch(x.as_ptr().wrapping_add((ahead + p) * channels + c));
                }
                let start = bias.map_or([0.0; LANES], |bias| load(bias, c));
                let taps = Taps {
                    ys: taps_y.clone(),
                    xs: 0..kw,
                };
                window::<FUSED, PIXELS>(conv, weights, x, (y, at), c, taps, start, row);
            }
            at += PIXELS;
        } else {
            for c in whole.clone().step_by(LANES) {
                let start = bias.map_or([0.0; LANES], |bias| load(bias, c));
                let xs = valid_taps(at, width, kw, s, conv.padding);
                let taps = Taps {
                    ys: taps_y.clone(),
                    xs,
                };
                window::<FUSED, 1>(conv, weights, x, (y, at), c, taps, start, row);
            }
            at += 1;
        }
    }
    if whole.end < row.channels.end {
        tail_channels::<FUSED>(conv, weights, bias, x, y, row, whole.end);
    }
}

/// Kernel rows and columns whose input exists.
struct Taps {
    ys: std::ops::Range<usize>,
    xs: std::ops::Range<usize>,
}

/// Sixteen channels from `c` of `COUNT` outputs from column `at` of row `y`, added to `start`.
#[inline(always)]
fn window<const FUSED: bool, const COUNT: usize>(
    conv: &Conv2d,
    weights: &[f32],
    x: &[f32],
    (y, at): (usize, usize),
    c: usize,
    taps: Taps,
    start: [f32; LANES],
    row: &Row,
) {
    let channels = conv.in_channels;
    let mut acc = [start; COUNT];
    for ky in taps.ys {
        let line = (y * conv.stride + ky - conv.padding) * conv.width;
        let first = (line + at * conv.stride + taps.xs.start - conv.padding) * channels + c;
        let count = taps.xs.len();
        if count == 0 {
            continue;
        }
        // One check for the run of taps of this kernel row; the loads below stay inside it.
        let last = first + ((COUNT - 1) * conv.stride + count - 1) * channels;
        let x = &x[first..last + LANES];
        let first = (ky * conv.kernel[1] + taps.xs.start) * channels + c;
        let w = &weights[first..first + (count - 1) * channels + LANES];
        for tap in 0..count {
            // SAFETY: `w` reaches `count` taps, `x` those of the last output.
            unsafe {
                let w = w.as_ptr().add(tap * channels).cast::<[f32; LANES]>().read();
                for (p, acc) in acc.iter_mut().enumerate() {
                    let x = x.as_ptr().add((p * conv.stride + tap) * channels);
                    add::<FUSED>(acc, &x.cast::<[f32; LANES]>().read(), &w);
                }
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        row.put((at + p) * channels + c, acc);
    }
}

/// The channels behind the last whole vector.
#[inline(always)]
fn tail_channels<const FUSED: bool>(
    conv: &Conv2d,
    weights: &[f32],
    bias: Option<&[f32]>,
    x: &[f32],
    y: usize,
    row: &Row,
    first: usize,
) {
    let (channels, s) = (conv.in_channels, conv.stride);
    let [kh, kw] = conv.kernel;
    for at in 0..conv.out_width() {
        for c in first..channels {
            let mut sum = bias.map_or(0.0, |bias| bias[c]);
            for ky in valid_taps(y, conv.height, kh, s, conv.padding) {
                for kx in valid_taps(at, conv.width, kw, s, conv.padding) {
                    let from =
                        (y * s + ky - conv.padding) * conv.width + at * s + kx - conv.padding;
                    let w = weights[(ky * kw + kx) * channels + c];
                    sum = fma::<FUSED>(x[from * channels + c], w, sum);
                }
            }
            row.put(at * channels + c, &[sum]);
        }
    }
}

#[inline(always)]
fn load(values: &[f32], at: usize) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    lanes.copy_from_slice(&values[at..at + LANES]);
    lanes
}

/// Asks for a cache line; any address is harmless.
#[inline(always)]
fn prefetch(_address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE is part of every x86-64 machine.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(_address.cast());
    }
}

#[inline(always)]
fn add<const FUSED: bool>(acc: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for lane in 0..LANES {
        acc[lane] = fma::<FUSED>(a[lane], b[lane], acc[lane]);
    }
}

/// The input gradient for any stride and kernel: each input pixel gathers the outputs it fed.
pub(super) fn backward_input_strided(
    isa: Isa,
    conv: &Conv2d,
    weight: &[f32],
    grad_out: &[f32],
    grad_x: &mut [f32],
) {
    let weights = reorder(conv, weight);
    let row_len = conv.width * conv.in_channels;
    let grad_x = SharedPtr(grad_x.as_mut_ptr());
    par_for(conv.batch * conv.height, |task| {
        let (image, y) = (task / conv.height, task % conv.height);
        let image_len = conv.out_height() * conv.out_width() * conv.out_channels;
        let grad_out = &grad_out[image * image_len..][..image_len];
        // SAFETY: each task owns one row of the gradient, whose length the caller checked.
        let row =
            unsafe { std::slice::from_raw_parts_mut(grad_x.get().add(task * row_len), row_len) };
        gather_row(isa, conv, &weights, grad_out, y, row);
    });
}

multiversion! {
    /// One row of the input gradient.
    fn gather_row = gather_row_body(
        conv: &Conv2d,
        weights: &[f32],
        grad_out: &[f32],
        y: usize,
        row: &mut [f32],
    )
}

#[inline(always)]
fn gather_row_body<const FUSED: bool>(
    conv: &Conv2d,
    weights: &[f32],
    grad_out: &[f32],
    y: usize,
    row: &mut [f32],
) {
    let channels = conv.in_channels;
    // The output that tap `k` takes from input `at`, if there is one.
    let source = |at: usize, k: usize, size: usize| {
        let from = (at + conv.padding).checked_sub(k)?;
        (from % conv.stride == 0 && from / conv.stride < size).then_some(from / conv.stride)
    };
    row.fill(0.0);
    for (x, pixel) in row.chunks_exact_mut(channels).enumerate() {
        for ky in 0..conv.kernel[0] {
            let Some(oy) = source(y, ky, conv.out_height()) else {
                continue;
            };
            for kx in 0..conv.kernel[1] {
                let Some(ox) = source(x, kx, conv.out_width()) else {
                    continue;
                };
                let grad = &grad_out[(oy * conv.out_width() + ox) * channels..][..channels];
                let w = &weights[(ky * conv.kernel[1] + kx) * channels..][..channels];
                for ((to, grad), w) in pixel.iter_mut().zip(grad).zip(w) {
                    *to = fma::<FUSED>(*grad, *w, *to);
                }
            }
        }
    }
}

/// The weight gradient, `[C, 1, kh, kw]`.
pub(super) fn backward_weight(
    isa: Isa,
    conv: &Conv2d,
    x: &[f32],
    grad_out: &[f32],
    grad_weight: &mut [f32],
    accumulate: bool,
) {
    let (channels, taps) = (conv.in_channels, conv.kernel[0] * conv.kernel[1]);
    let size = channels * taps;
    let out_height = conv.out_height();
    let rows = conv.batch * out_height;
    // Fixed shares, each with its own sums, so that the order of sums is fixed too.
    let shares = (4 * num_threads()).min(rows).max(1);
    let mut sums = Scratch::take(shares * size * 4);
    let shared = SharedPtr(sums.as_mut_ptr().cast::<f32>());
    par_for(shares, |share| {
        // SAFETY: each share owns its own `size` sums.
        let sums = unsafe {
            let sums = shared.get().add(share * size);
            sums.write_bytes(0, size);
            std::slice::from_raw_parts_mut(sums, size)
        };
        for row in rows * share / shares..rows * (share + 1) / shares {
            let (image, y) = (row / out_height, row % out_height);
            let image_len = conv.height * conv.width * channels;
            let row_len = conv.out_width() * channels;
            let x = &x[image * image_len..][..image_len];
            weight_row(isa, conv, x, &grad_out[row * row_len..][..row_len], y, sums);
        }
    });
    for c in 0..channels {
        for tap in 0..taps {
            // SAFETY: all shares were written above.
            let sum: f32 = (0..shares)
                .map(|share| unsafe { *shared.get().add(share * size + tap * channels + c) })
                .sum();
            let to = &mut grad_weight[c * taps + tap];
            *to = if accumulate { *to + sum } else { sum };
        }
    }
}

multiversion! {
    /// Adds what one output row contributes to `sums`, `[ky][kx][channel]`.
    fn weight_row = weight_row_body(
        conv: &Conv2d,
        x: &[f32],
        grad_row: &[f32],
        y: usize,
        sums: &mut [f32],
    )
}

#[inline(always)]
fn weight_row_body<const FUSED: bool>(
    conv: &Conv2d,
    x: &[f32],
    grad_row: &[f32],
    y: usize,
    sums: &mut [f32],
) {
    let channels = conv.in_channels;
    let [kh, kw] = conv.kernel;
    for ky in valid_taps(y, conv.height, kh, conv.stride, conv.padding) {
        let line = (y * conv.stride + ky - conv.padding) * conv.width * channels;
        let line = &x[line..][..conv.width * channels];
        let sums = &mut sums[ky * kw * channels..][..kw * channels];
        let whole = channels - channels % LANES;
        // Blocks of pixels outside, channels inside: memory is then read in order.
        for first in (0..conv.out_width()).step_by(BLOCK_PIXELS) {
            let outs = first..(first + BLOCK_PIXELS).min(conv.out_width());
            for c in (0..whole).step_by(LANES) {
                let outs = outs.clone();
                match kw {
                    3 => weight_taps::<FUSED, 3, LANES>(conv, line, grad_row, outs, c, sums),
                    5 => weight_taps::<FUSED, 5, LANES>(conv, line, grad_row, outs, c, sums),
                    _ => weight_taps::<FUSED, 1, LANES>(conv, line, grad_row, outs, c, sums),
                }
            }
            for c in whole..channels {
                weight_taps::<FUSED, 1, 1>(conv, line, grad_row, outs.clone(), c, sums);
            }
        }
    }
}

/// `WIDTH` channels from `c` over some outputs of one row, `TAPS` taps of a kernel row at a time.
#[inline(always)]
fn weight_taps<const FUSED: bool, const TAPS: usize, const WIDTH: usize>(
    conv: &Conv2d,
    line: &[f32],
    grad_row: &[f32],
    outs: std::ops::Range<usize>,
    c: usize,
    sums: &mut [f32],
) {
    let (channels, s) = (conv.in_channels, conv.stride);
    for first in (0..conv.kernel[1]).step_by(TAPS) {
        let mut acc = [[0.0_f32; WIDTH]; TAPS];
        for out in outs.clone() {
            let valid = valid_taps(out, conv.width, conv.kernel[1], s, conv.padding);
            let grad = &grad_row[out * channels + c..][..WIDTH];
            // SAFETY: `grad` holds `WIDTH` values.
            let grad = unsafe { grad.as_ptr().cast::<[f32; WIDTH]>().read() };
            let inner = valid.start <= first && valid.end >= first + TAPS;
            if inner {
                let from = (out * s + first - conv.padding) * channels + c;
                let values = &line[from..from + (TAPS - 1) * channels + WIDTH];
                for tap in 0..TAPS {
                    // SAFETY: `values` reaches the last tap.
                    let values = unsafe {
                        values
                            .as_ptr()
                            .add(tap * channels)
                            .cast::<[f32; WIDTH]>()
                            .read()
                    };
                    for lane in 0..WIDTH {
                        acc[tap][lane] = fma::<FUSED>(values[lane], grad[lane], acc[tap][lane]);
                    }
                }
                continue;
            }
            for tap in 0..TAPS {
                let kx = first + tap;
                if valid.contains(&kx) {
                    let from = (out * s + kx - conv.padding) * channels + c;
                    let values = &line[from..from + WIDTH];
                    for lane in 0..WIDTH {
                        acc[tap][lane] = fma::<FUSED>(values[lane], grad[lane], acc[tap][lane]);
                    }
                }
            }
        }
        for (tap, acc) in acc.iter().enumerate() {
            let to = &mut sums[(first + tap) * channels + c..][..WIDTH];
            to.iter_mut().zip(acc).for_each(|(to, sum)| *to += sum);
        }
    }
}
