//! The blocks of DC-AE's coarse stages for inference: multi-scale ReLU linear attention, then a gated
//! depthwise convolution (EfficientViT, Cai et al. 2023; the gated convolution is Sana's).
//!
//! Weights are packed once. The gated convolution has eight times the channels of its input; it is run
//! in bands of rows, so that these stay in cache and never exist all at once.

use crate::attention::{LinearAttentionShape, linear_attention_columns};
use crate::conv::{Norm, PackedConv2d, add_norm_rows};
use crate::error::{KernelError, check_eq};
use crate::gemm::{Activation, Epilogue};
use crate::math::activate;
use crate::packed::{PackedLinear, packed_linear};
use crate::pool::{Scratch, SharedPtr, par_for};
use crate::simd::{Level, simd_kernel};

/// Pixels of a band of the gated convolution, at least.
const BAND_PIXELS: usize = 512;

/// Queries, keys and values that see a neighbourhood: a depthwise convolution of all three, then a
/// product within each head.
#[derive(Debug)]
pub struct MixedScale {
    /// Depthwise, of odd size, stride 1, and without bias.
    pub depthwise: PackedConv2d,
    /// 1 x 1, in groups of the head's channels.
    pub grouped: PackedConv2d,
}

/// Weights of an [`EfficientVit`] block of `c` channels with `s` scales and `h` hidden channels.
#[derive(Debug)]
pub struct EfficientVitWeights {
    /// Channels of a head.
    pub head_dim: usize,
    /// Queries, keys and values, `[3 c, c]`.
    pub qkv: PackedLinear,
    /// The scales besides the plain one.
    pub scales: Vec<MixedScale>,
    /// After the attention, `[c, (1 + s) c]`.
    pub out: PackedLinear,
    /// After that.
    pub out_norm: Norm,
    /// First layer of the gated convolution, values then gates, `[2 h, c]` with bias.
    pub inverted: PackedLinear,
    /// Its depthwise convolution, `[2 h, 1, 3, 3]`.
    pub depthwise: Vec<f32>,
    /// The bias, `[2 h]`.
    pub depthwise_bias: Vec<f32>,
    /// Last layer, `[c, h]`.
    pub point: PackedLinear,
    /// After that.
    pub norm: Norm,
}

/// `x += norm(out(attention(x)))`, then `x += norm(point(glu(depthwise(silu(inverted(x))))))`.
#[derive(Debug)]
pub struct EfficientVit {
    channels: usize,
    hidden: usize,
    weights: EfficientVitWeights,
    /// The depthwise weights as `[tap][channel]`.
    taps: Vec<f32>,
}

impl EfficientVit {
    /// The block with these weights.
    ///
    /// # Errors
    /// If they do not fit each other.
    pub fn new(mut weights: EfficientVitWeights) -> Result<Self, KernelError> {
        let (c, hidden) = (weights.qkv.inputs(), weights.point.inputs());
        let scales = weights.scales.len();
        if c == 0 || weights.head_dim == 0 || !c.is_multiple_of(weights.head_dim) {
            return Err(KernelError::Unsupported {
                what: "linear attention head dimension",
                value: weights.head_dim,
                help: "it must divide the channels",
            });
        }
        check_eq("attention: q, k and v", 3 * c, weights.qkv.outputs())?;
        check_eq(
            "attention: output layer inputs",
            (1 + scales) * c,
            weights.out.inputs(),
        )?;
        check_eq("attention: output layer outputs", c, weights.out.outputs())?;
        for scale in &weights.scales {
            for conv in [&scale.depthwise, &scale.grouped] {
                check_eq("attention scale: inputs", 3 * c, conv.inputs())?;
                check_eq(
                    "attention scale: outputs",
                    3 * c,
                    conv.output_dims([64, 64])[2],
                )?;
                check_eq("attention scale: height", 64, conv.output_dims([64, 64])[0])?;
            }
        }
        check_eq("gated convolution: inputs", c, weights.inverted.inputs())?;
        check_eq(
            "gated convolution: hidden",
            2 * hidden,
            weights.inverted.outputs(),
        )?;
        check_eq("gated convolution: outputs", c, weights.point.outputs())?;
        check_eq(
            "gated convolution: weights",
            18 * hidden,
            weights.depthwise.len(),
        )?;
        check_eq(
            "gated convolution: biases",
            2 * hidden,
            weights.depthwise_bias.len(),
        )?;
        weights.out_norm.check(c)?;
        weights.norm.check(c)?;
        let plain = std::mem::take(&mut weights.depthwise);
        let width = 2 * hidden;
        let taps = (0..9 * width).map(|at| plain[at % width * 9 + at / width]);
        Ok(Self {
            channels: c,
            hidden,
            taps: taps.collect(),
            weights,
        })
    }

    /// Channels of the image.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Floating-point operations of one run over an image of this size (two per multiply-add).
    pub fn flop(&self, [height, width]: [usize; 2]) -> f64 {
        let pixels = (height * width) as f64;
        let weights = &self.weights;
        let linear = |layer: &PackedLinear| (layer.inputs() * layer.outputs()) as f64;
        let layers = linear(&weights.qkv)
            + linear(&weights.out)
            + linear(&weights.inverted)
            + linear(&weights.point);
        let depthwise = 18.0 * self.hidden as f64;
        // Values by keys, and queries by that.
        let attention = 2.0 * (weights.out.inputs() * (weights.head_dim + 1)) as f64;
        let scales = weights.scales.iter();
        let scales = scales.map(|scale| {
            scale.depthwise.flop([1, height, width]) + scale.grouped.flop([1, height, width])
        });
        2.0 * pixels * (layers + depthwise + attention) + scales.sum::<f64>()
    }

    /// Applies the block to the image `x` (`[height, width, channels]`) in place.
    ///
    /// # Errors
    /// If `x` has another length.
    pub fn run(&self, [height, width]: [usize; 2], x: &mut [f32]) -> Result<(), KernelError> {
        let count = height.saturating_mul(width).saturating_mul(self.channels);
        check_eq("linear attention block: input elements", count, x.len())?;
        if x.is_empty() {
            return Ok(());
        }
        self.attention([height, width], x)?;
        self.gated_convolution([height, width], x)
    }

    fn attention(&self, [height, width]: [usize; 2], x: &mut [f32]) -> Result<(), KernelError> {
        let (c, pixels) = (self.channels, height * width);
        let EfficientVitWeights {
            head_dim,
            qkv,
            scales,
            out,
            out_norm,
            ..
        } = &self.weights;
        let shape = LinearAttentionShape {
            batch: 1,
            tokens: pixels,
            groups: c / head_dim,
            head_dim: *head_dim,
        };
        let (all, wide) = (pixels * 3 * c, pixels * out.inputs());
        let mut plain = Values::take(all);
        let mut heads = Values::take(wide);
        packed_linear(qkv, x, Activation::None, plain.slice())?;
        let level = Level::active();
        linear_attention_columns(level, shape, plain.slice(), heads.slice(), out.inputs(), 0)?;
        let size = [1, height, width];
        for (i, scale) in scales.iter().enumerate() {
            let mut seen = Values::take(all);
            let mut mixed = Values::take(all);
            let none = Epilogue::default;
            scale
                .depthwise
                .forward(plain.slice(), size, seen.slice(), false, none())?;
            scale
                .grouped
                .forward(seen.slice(), size, mixed.slice(), false, none())?;
            let column = (1 + i) * c;
            let (mixed, heads) = (mixed.slice(), heads.slice());
            linear_attention_columns(level, shape, mixed, heads, out.inputs(), column)?;
        }
        let projected = &mut plain.slice()[..pixels * c];
        packed_linear(out, heads.slice(), Activation::None, projected)?;
        add_norm_rows(level, out_norm, projected, x);
        Ok(())
    }

    fn gated_convolution(
        &self,
        [height, width]: [usize; 2],
        x: &mut [f32],
    ) -> Result<(), KernelError> {
        let (c, hidden) = (self.channels, self.hidden);
        let EfficientVitWeights {
            inverted,
            point,
            norm,
            ..
        } = &self.weights;
        let band = BAND_PIXELS.div_ceil(width).min(height);
        let row = width * 2 * hidden;
        // Rows from the one above the band to the one below it.
        let mut rows = Values::take((band + 2) * row);
        let mut gated = Values::take(band * width * hidden);
        let mut result = Values::take(band * width * c);
        let rows = rows.slice();
        let level = Level::active();
        let (mut first, mut end) = (0, 0);
        for top in (0..height).step_by(band) {
            let bottom = (top + band).min(height);
            let from = top.saturating_sub(1);
            rows.copy_within((from - first) * row..(end - first) * row, 0);
            first = from;
            let to = (bottom + 1).min(height);
            let input = &x[end * width * c..to * width * c];
            let target = &mut rows[(end - first) * row..(to - first) * row];
            packed_linear(inverted, input, Activation::Silu, target)?;
            end = to;

            let pixels = (bottom - top) * width;
            let gated = &mut gated.slice()[..pixels * hidden];
            let depth = Depthwise {
                taps: &self.taps,
                bias: &self.weights.depthwise_bias,
                hidden,
                width,
                rows: &rows[..(end - first) * row],
                first,
                end,
            };
            depth.run(level, top, gated);
            let result = &mut result.slice()[..pixels * c];
            packed_linear(point, gated, Activation::None, result)?;
            add_norm_rows(
                level,
                norm,
                result,
                &mut x[top * width * c..bottom * width * c],
            );
        }
        Ok(())
    }
}

/// Memory of this thread, kept from run to run; its values are arbitrary.
struct Values {
    scratch: Scratch,
    len: usize,
}

impl Values {
    fn take(len: usize) -> Self {
        Self {
            scratch: Scratch::take(len * 4),
            len,
        }
    }

    fn slice(&mut self) -> &mut [f32] {
        // SAFETY: the scratch holds as many initialised values, and is borrowed with the slice.
        unsafe { std::slice::from_raw_parts_mut(self.scratch.as_mut_ptr().cast(), self.len) }
    }
}

/// The depthwise part of a gated convolution over some rows, and the gate.
#[derive(Clone, Copy)]
struct Depthwise<'a> {
    /// `[9][2 hidden]`
    taps: &'a [f32],
    bias: &'a [f32],
    hidden: usize,
    width: usize,
    /// Rows `first..end` of the image, `[width, 2 hidden]` each; others are zeros.
    rows: &'a [f32],
    first: usize,
    end: usize,
}

/// Neighbouring pixels computed together: their weights are read once, and most of their inputs.
const PIXELS: usize = 4;
/// Channels of a task: three rows of them stay in the second-level cache.
const CHANNELS: usize = 128;

/// The pixels under the taps of [`PIXELS`] outputs: values then gates, `2 hidden` each.
type Patch<'a> = [[&'a [f32]; PIXELS + 2]; 3];

impl Depthwise<'_> {
    /// Rows from `top` on, `[width, hidden]` each.
    fn run(&self, level: Level, top: usize, out: &mut [f32]) {
        let (width, hidden) = (self.width, self.hidden);
        let rows = out.len() / (width * hidden);
        let out = SharedPtr(out.as_mut_ptr());
        let zeros = vec![0.0; 2 * hidden];
        par_for(hidden.div_ceil(CHANNELS), |part| {
            let channels = part * CHANNELS..((part + 1) * CHANNELS).min(hidden);
            for row in 0..rows {
                for left in (0..width).step_by(PIXELS) {
                    let pixel = |ky: usize, kx: usize| {
                        let (y, x) = (
                            (top + row + ky).wrapping_sub(1),
                            (left + kx).wrapping_sub(1),
                        );
                        if !(self.first..self.end).contains(&y) || x >= width {
                            return &zeros[..];
                        }
                        let at = (y - self.first) * width + x;
                        &self.rows[at * 2 * hidden..][..2 * hidden]
                    };
                    let patch: Patch<'_> =
                        std::array::from_fn(|ky| std::array::from_fn(|kx| pixel(ky, kx)));
                    for c in channels.clone().step_by(GROUP) {
                        let mut sums = [[0.0; GROUP]; PIXELS];
                        gated_pixels(level, &patch, self.taps, self.bias, c, &mut sums);
                        let count = GROUP.min(channels.end - c);
                        for (x, sums) in (left..width).zip(&sums) {
                            // SAFETY: `out` holds all rows; each task has its own channels.
                            unsafe {
                                let to = out.get().add((row * width + x) * hidden + c);
                                std::ptr::copy_nonoverlapping(sums.as_ptr(), to, count);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Channels that [`gated_pixels`] computes per call.
const GROUP: usize = 64;

simd_kernel! {
    /// Neighbouring pixels, [`GROUP`] channels from `c` (or what is left of them): `value * silu(gate)`,
    /// each a bias plus nine taps of its channels.
    fn gated_pixels<S>(
        s,
        patch: &Patch<'_>,
        taps: &[f32],
        bias: &[f32],
        c: usize,
        out: &mut [[f32; GROUP]; PIXELS],
    ) {
        let hidden = bias.len() / 2;
        let (values, gates) = bias.split_at(hidden);
        for i in (0..GROUP.min(hidden - c)).step_by(S::LANES) {
            let mut value = [s.load_at(values, c + i); PIXELS];
            let mut gate = [s.load_at(gates, c + i); PIXELS];
            for (ky, row) in patch.iter().enumerate() {
                // No closures here: they might not be compiled for the instruction set.
                let mut of_values = [s.splat(0.0); 3];
                let mut of_gates = [s.splat(0.0); 3];
                for kx in 0..3 {
                    let taps = &taps[(3 * ky + kx) * 2 * hidden..][..2 * hidden];
                    of_values[kx] = s.load_at(&taps[..hidden], c + i);
                    of_gates[kx] = s.load_at(&taps[hidden..], c + i);
                }
                for (at, pixel) in row.iter().enumerate() {
                    let (x, g) = pixel.split_at(hidden);
                    let (x, g) = (s.load_at(x, c + i), s.load_at(g, c + i));
                    for kx in 0..3 {
                        // This pixel lies under tap `kx` of output `at - kx`.
                        if at >= kx && at - kx < PIXELS {
                            value[at - kx] = s.fma(x, of_values[kx], value[at - kx]);
                            gate[at - kx] = s.fma(g, of_gates[kx], gate[at - kx]);
                        }
                    }
                }
            }
            for (p, out) in out.iter_mut().enumerate() {
                s.store_at(out, i, s.mul(value[p], activate(s, Activation::Silu, gate[p])));
            }
        }
    }
}

#[cfg(test)]
#[path = "efficientvit_tests.rs"]
mod tests;
