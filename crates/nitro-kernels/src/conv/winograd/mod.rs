//! 3x3 convolutions of stride 1 by Winograd's minimal filtering, channel-last, for inference.
//!
//! A tile of outputs takes a quarter of the multiplications of the direct form (see [`form`]). Blocks
//! of tiles are the tasks: a block's inputs are transformed into one factor per point of evaluation,
//! multiplied with the transformed weights panel by panel, and each panel's products are transformed
//! into outputs while they are in cache; nothing of this passes through main memory.
//!
//! Reduced precision is 16-bit integers with 32-bit sums (`vpdpwssd`), which run at the speed of bf16:
//! each tile's row of a factor is scaled by its norm and each column of weights by its own, so that no
//! sum can overflow. The larger tile amplifies rounding, and with bf16's eight bits would lose more
//! than a direct convolution does (1.2 % against 0.24 % on white noise); with these it loses less
//! (0.05 %).

mod form;
mod product;
#[cfg(test)]
mod tests;
mod transform;
mod weights;

use super::norm::add_norm;
use crate::error::{KernelError, check_eq, check_len};
use crate::gemm::Activation;
use crate::isa::{Isa, Precision};
use crate::packed::{PackedBytes, PackedForm};
use crate::pool::{Scratch, SharedPtr, num_threads, par_for};
use crate::simd::Level;
use crate::tile::{Left, Out, Right, Size, Start, multiply};
use form::{Doubled, Form, Same};
use transform::{Input, Output};
use weights::{LANES, MAX_INT16_CHANNELS, MAX_VECTORS, Panel, Weights};

/// Output pixels of a block of tiles.
const BLOCK_PIXELS: usize = 512;
/// Tiles are counted in these, the rows of a product.
const TILE_STEP: usize = 8;
/// Counts changes of the order, the transforms or the rounding of packed weights.
const LAYOUT: u32 = 1;

/// What a [`WinogradConv`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WinogradForm {
    /// A 3x3 convolution with zero padding: output as large as the input.
    Same,
    /// The same after every pixel was repeated twice in each direction: output twice as large.
    Doubled,
}

/// Some rows of a channel-last image `[height, width, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct ImageRows<'a> {
    /// The values of the rows.
    pub data: &'a [f32],
    /// The row of the image that is first in `data`.
    pub first: usize,
}

/// What becomes of a convolution's result.
#[derive(Clone, Copy, Debug)]
pub enum Finish<'a> {
    /// `out = activation(conv + bias)`.
    Store {
        /// One value per output channel.
        bias: Option<&'a [f32]>,
        /// Applied last.
        activation: Activation,
    },
    /// `out += conv + bias`.
    Add {
        /// One value per output channel.
        bias: Option<&'a [f32]>,
    },
    /// `out += conv / rms(conv) * weight + bias`, with the root of the mean square over the channels.
    AddNorm {
        /// One value per output channel.
        weight: &'a [f32],
        /// One value per output channel.
        bias: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
}

/// Transformed weights of a 3x3 convolution.
pub struct WinogradConv {
    form: WinogradForm,
    level: Level,
    int16: bool,
    inputs: usize,
    outputs: usize,
    weights: Weights,
}

impl std::fmt::Debug for WinogradConv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WinogradConv")
            .field("form", &self.form)
            .field("int16", &self.int16)
            .field("inputs", &self.inputs)
            .field("outputs", &self.outputs)
            .finish_non_exhaustive()
    }
}

impl WinogradConv {
    /// Transforms `weight` (`[outputs, inputs, 3, 3]`). [`Precision::Bf16`] means 16-bit integers where
    /// the machine has the instruction, else f32.
    ///
    /// # Errors
    /// If there are no channels or `weight` has another length.
    pub fn new(
        form: WinogradForm,
        [outputs, inputs]: [usize; 2],
        weight: &[f32],
        precision: Precision,
    ) -> Result<Self, KernelError> {
        Self::with_isa(Isa::current(), form, [outputs, inputs], weight, precision)
    }

    /// [`WinogradConv::new`] for a given instruction set.
    ///
    /// # Errors
    /// As [`WinogradConv::new`].
    pub fn with_isa(
        isa: Isa,
        form: WinogradForm,
        shape: [usize; 2],
        weight: &[f32],
        precision: Precision,
    ) -> Result<Self, KernelError> {
        let conv = Self::empty(isa, form, shape, precision)?;
        let [outputs, inputs] = shape;
        let count = outputs.saturating_mul(inputs).saturating_mul(9);
        check_eq("winograd: weight elements", count, weight.len())?;
        let bytes = match form {
            WinogradForm::Same => conv.weights.pack::<Same>(weight, shape),
            WinogradForm::Doubled => conv.weights.pack::<Doubled>(weight, shape),
        };
        Ok(conv.with_bytes(bytes))
    }

    /// The convolution whose weights (`[outputs, inputs, 3, 3]`) were transformed before, from
    /// [`WinogradConv::packed`].
    ///
    /// # Errors
    /// If there are no channels or `bytes` are not as long as [`WinogradConv::packed_form`] says.
    pub fn from_packed(
        form: WinogradForm,
        shape: [usize; 2],
        precision: Precision,
        bytes: PackedBytes,
    ) -> Result<Self, KernelError> {
        let conv = Self::empty(Isa::current(), form, shape, precision)?;
        check_eq("bytes of packed weights", conv.weights.len(), bytes.len())?;
        Ok(conv.with_bytes(bytes))
    }

    /// In what form this machine packs weights `[outputs, inputs, 3, 3]`.
    ///
    /// # Errors
    /// If there are no channels.
    pub fn packed_form(
        form: WinogradForm,
        shape: [usize; 2],
        precision: Precision,
    ) -> Result<PackedForm, KernelError> {
        let conv = Self::empty(Isa::current(), form, shape, precision)?;
        let [outputs, inputs] = shape;
        let kind = if conv.int16 { "int16" } else { "f32" };
        Ok(PackedForm {
            name: format!("winograd {LAYOUT} {form:?} {kind} {outputs}x{inputs}"),
            len: conv.weights.len(),
        })
    }

    fn with_bytes(self, bytes: PackedBytes) -> Self {
        Self {
            weights: self.weights.with_bytes(bytes),
            ..self
        }
    }

    /// Everything but the weights.
    fn empty(
        isa: Isa,
        form: WinogradForm,
        [outputs, inputs]: [usize; 2],
        precision: Precision,
    ) -> Result<Self, KernelError> {
        if inputs == 0 || outputs == 0 {
            return Err(KernelError::Unsupported {
                what: "winograd channels",
                value: 0,
                help: "use 1 or more",
            });
        }
        let isa = isa.or_portable();
        let int16 = precision != Precision::F32
            && isa == Isa::Avx512Bf16
            && inputs <= MAX_INT16_CHANNELS
            && product::has_int16();
        let side = match form {
            WinogradForm::Same => Same::SIDE,
            WinogradForm::Doubled => Doubled::SIDE,
        };
        let weights = Weights::empty(side * side, [outputs, inputs], int16);
        Ok(Self {
            form,
            level: Level::of(isa),
            int16,
            inputs,
            outputs,
            weights,
        })
    }

    /// What it computes.
    pub fn form(&self) -> WinogradForm {
        self.form
    }

    /// Channels of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Channels of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of the transformed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.len()
    }

    /// The transformed weights, to be kept for [`WinogradConv::from_packed`].
    pub fn packed(&self) -> &PackedBytes {
        self.weights.bytes()
    }

    /// Floating-point operations of the direct convolution of an image of this size (two per
    /// multiply-add).
    pub fn flop(&self, [height, width]: [usize; 2]) -> f64 {
        let pixels = (height * width * self.scale().pow(2)) as f64;
        18.0 * pixels * (self.inputs * self.outputs) as f64
    }

    /// Output pixels per input pixel, in each direction.
    pub fn scale(&self) -> usize {
        match self.form {
            WinogradForm::Same => 1,
            WinogradForm::Doubled => 2,
        }
    }

    /// Output rows come in bands of this many. Computed band by band, rows are the same to the last
    /// bit however the bands are grouped into calls.
    pub fn band(&self) -> usize {
        match self.form {
            WinogradForm::Same => Same::OUT,
            WinogradForm::Doubled => Doubled::OUT,
        }
    }

    /// The input rows that output rows `rows` (from the beginning of a band) are computed from.
    pub fn rows_needed(
        &self,
        rows: std::ops::Range<usize>,
        height: usize,
    ) -> std::ops::Range<usize> {
        let (out, step) = match self.form {
            WinogradForm::Same => (Same::OUT, Same::STEP),
            WinogradForm::Doubled => (Doubled::OUT, Doubled::STEP),
        };
        let from = rows.start / out * step;
        let to = rows.end.div_ceil(out) * step;
        from.saturating_sub(1).min(height)..(to + 1).min(height)
    }

    /// Output rows `rows` of the convolution of an image of `height` x `width` pixels, of which `input`
    /// holds at least [`rows_needed`](Self::rows_needed). `out` is those output rows. `rows` begins at a
    /// multiple of [`band`](Self::band), and ends at one or at the image's end.
    ///
    /// # Errors
    /// If a slice has another length than its shape, or rows are missing.
    pub fn forward(
        &self,
        [height, width]: [usize; 2],
        input: ImageRows<'_>,
        rows: std::ops::Range<usize>,
        out: &mut [f32],
        finish: Finish<'_>,
    ) -> Result<(), KernelError> {
        let scale = self.scale();
        let row = scale * width * self.outputs;
        check_eq(
            "winograd: output elements",
            rows.len().saturating_mul(row),
            out.len(),
        )?;
        if rows.is_empty() || width == 0 {
            return Ok(());
        }
        let band = self.band();
        let whole = rows.end.is_multiple_of(band) || rows.end == scale * height;
        if !rows.start.is_multiple_of(band) || !whole || rows.end > scale * height {
            return Err(KernelError::Unsupported {
                what: "winograd output rows",
                value: rows.start,
                help: "give whole bands of rows inside the image",
            });
        }
        let needed = self.rows_needed(rows.clone(), height);
        let input_row = width.saturating_mul(self.inputs);
        check_len(
            "winograd: input rows before the first",
            input.first,
            needed.start,
        )?;
        let reach = (needed.end - input.first).saturating_mul(input_row);
        check_len("winograd: input rows", reach, input.data.len())?;
        self.check_finish(&finish)?;
        let call = Call {
            conv: self,
            height,
            width,
            input,
            rows,
            out: SharedPtr(out.as_mut_ptr()),
            finish,
        };
        match self.form {
            WinogradForm::Same => call.run::<Same>(transform::input_same, transform::output_same),
            WinogradForm::Doubled => {
                call.run::<Doubled>(transform::input_doubled, transform::output_doubled);
            }
        }
        Ok(())
    }

    fn check_finish(&self, finish: &Finish<'_>) -> Result<(), KernelError> {
        let check = |what, slice: &[f32]| check_eq(what, self.outputs, slice.len());
        match *finish {
            Finish::Store { bias, .. } | Finish::Add { bias } => {
                bias.map_or(Ok(()), |bias| check("winograd: bias values", bias))
            }
            Finish::AddNorm { weight, bias, .. } => {
                check("winograd: norm weights", weight)?;
                check("winograd: norm biases", bias)
            }
        }
    }
}

/// One call of [`WinogradConv::forward`], checked.
struct Call<'a> {
    conv: &'a WinogradConv,
    height: usize,
    width: usize,
    input: ImageRows<'a>,
    rows: std::ops::Range<usize>,
    out: SharedPtr<f32>,
    finish: Finish<'a>,
}

/// Sizes of the scratch memory of a block; bytes but for `padded`.
struct Sizes {
    /// Values per pixel of a transformed tile.
    padded: usize,
    /// Factors: per tile, and per point. A cache line between the points keeps those of one tile
    /// out of the same cache sets.
    factor: usize,
    factor_plane: usize,
    /// Products: the same.
    product: usize,
    product_plane: usize,
}

impl<'a> Call<'a> {
    fn run<F: Form>(&self, input: fn(Level, Input), output: fn(Level, Output)) {
        let conv = self.conv;
        let across = (F::SCALE * self.width).div_ceil(F::OUT);
        let down = self.rows.len().div_ceil(F::OUT);
        let tiles = across * down;
        let threads = num_threads();
        // Equal blocks, as many for every thread.
        let most = BLOCK_PIXELS / (F::OUT * F::OUT);
        let blocks = tiles.div_ceil(most).next_multiple_of(threads);
        let count = tiles.div_ceil(blocks).next_multiple_of(TILE_STEP);
        let blocks = tiles.div_ceil(count);
        let points = F::SIDE * F::SIDE;
        let padded = conv.inputs.next_multiple_of(LANES);
        let factor = padded * if conv.int16 { 2 } else { 4 };
        let product = MAX_VECTORS * LANES * 4;
        let sizes = Sizes {
            padded,
            factor,
            factor_plane: count * factor + 64,
            product,
            product_plane: count * product + 64,
        };
        par_for(blocks, |block| {
            let block = Block {
                call: self,
                tiles: block * count..((block + 1) * count).min(tiles),
                across,
                sizes: &sizes,
                points,
            };
            block.run::<F>(input, output);
        });
    }
}

/// Consecutive tiles, row by row, computed by one thread.
struct Block<'a> {
    call: &'a Call<'a>,
    tiles: std::ops::Range<usize>,
    /// Tiles in a row of them.
    across: usize,
    sizes: &'a Sizes,
    points: usize,
}

impl Block<'_> {
    fn run<F: Form>(&self, input: fn(Level, Input), output: fn(Level, Output)) {
        let (conv, sizes, points) = (self.call.conv, self.sizes, self.points);
        let count = self.tiles.len();
        let mut factors = Scratch::take(points * sizes.factor_plane);
        let mut steps = Scratch::take(count * points * 4);
        let steps = steps.as_mut_ptr().cast::<f32>();
        // SAFETY: the scratch holds a factor of `count` rows for each point, and their steps.
        unsafe { self.transform_inputs::<F>(input, factors.as_mut_ptr(), steps) };

        let mut products = Scratch::take(points * sizes.product_plane);
        let tile_values = F::OUT * F::OUT * conv.outputs;
        let norm = matches!(self.call.finish, Finish::AddNorm { .. });
        let mut raw = Scratch::take(if norm { count * tile_values * 4 } else { 0 });
        for panel in 0..conv.weights.panels() {
            let panel = conv.weights.panel(panel);
            for point in 0..points {
                let factor = factors
                    .as_mut_ptr()
                    .wrapping_add(point * sizes.factor_plane);
                let product = products
                    .as_mut_ptr()
                    .wrapping_add(point * sizes.product_plane);
                // SAFETY: both planes lie in their scratch and hold whole groups of rows.
                unsafe { self.multiply(panel, point, factor, product) };
            }
            for tile in 0..count {
                let place = self.place::<F>(tile);
                let first = panel.first * LANES;
                let (bias, activation, add) = match self.call.finish {
                    Finish::Store { bias, activation } => (bias, activation, false),
                    Finish::Add { bias } => (bias, Activation::None, true),
                    Finish::AddNorm { .. } => (None, Activation::None, false),
                };
                let (target, row) = if norm {
                    let at = tile * tile_values;
                    (
                        raw.as_mut_ptr().cast::<f32>().wrapping_add(at),
                        F::OUT * conv.outputs,
                    )
                } else {
                    (place.target, place.row)
                };
                let int16 = conv.int16;
                output(
                    conv.level,
                    Output {
                        products: products.as_mut_ptr().wrapping_add(tile * sizes.product),
                        plane: sizes.product_plane,
                        row_steps: if int16 {
                            steps.wrapping_add(tile * points)
                        } else {
                            std::ptr::null()
                        },
                        column_steps: if int16 {
                            conv.weights.steps()[first..].as_ptr()
                        } else {
                            std::ptr::null()
                        },
                        column_pitch: conv.weights.vectors() * LANES,
                        columns: (panel.vectors * LANES).min(conv.outputs - first),
                        bias: bias.map_or(std::ptr::null(), |bias| bias[first..].as_ptr()),
                        target: target.wrapping_add(first),
                        pixel: conv.outputs,
                        row,
                        rows: place.rows,
                        pixels: place.pixels,
                        add,
                        activation,
                    },
                );
            }
        }
        if let Finish::AddNorm { weight, bias, eps } = self.call.finish {
            for tile in 0..count {
                let place = self.place::<F>(tile);
                for y in 0..place.rows {
                    for x in 0..place.pixels {
                        let at = tile * tile_values + (y * F::OUT + x) * conv.outputs;
                        // SAFETY: the pixel was written above; the output pixel is the tile's own.
                        let (raw, out) = unsafe {
                            let raw = raw.as_mut_ptr().cast::<f32>().add(at);
                            let out = place.target.add(y * place.row + x * conv.outputs);
                            (
                                std::slice::from_raw_parts(raw.cast_const(), conv.outputs),
                                std::slice::from_raw_parts_mut(out, conv.outputs),
                            )
                        };
                        add_norm(conv.level, raw, weight, bias, eps, out);
                    }
                }
            }
        }
    }

    /// Row and column of a tile of this block, in tiles of the image.
    fn position<F: Form>(&self, tile: usize) -> (usize, usize) {
        let tile = self.tiles.start + tile;
        (
            self.call.rows.start / F::OUT + tile / self.across,
            tile % self.across,
        )
    }

    /// Where a tile's outputs go.
    fn place<F: Form>(&self, tile: usize) -> Place {
        let call = self.call;
        let (down, across) = self.position::<F>(tile);
        let (top, left) = (down * F::OUT, across * F::OUT);
        let width = F::SCALE * call.width;
        let row = width * call.conv.outputs;
        Place {
            target: call
                .out
                .get()
                .wrapping_add((top - call.rows.start) * row + left * call.conv.outputs),
            row,
            rows: F::OUT.min(call.rows.end - top),
            pixels: F::OUT.min(width - left),
        }
    }

    /// # Safety
    /// `factors` must hold the planes of all points, `steps` the steps of all tiles.
    unsafe fn transform_inputs<F: Form>(
        &self,
        input: fn(Level, Input),
        factors: *mut u8,
        steps: *mut f32,
    ) {
        let (call, sizes) = (self.call, self.sizes);
        let conv = call.conv;
        let channels = conv.inputs;
        let row = call.width * channels;
        let mut scratch = Scratch::take(self.points * sizes.padded * 4);
        let mut patch = Scratch::take(self.points * channels * 4);
        let patch = patch.as_mut_ptr().cast::<f32>();
        for tile in 0..self.tiles.len() {
            let (down, across) = self.position::<F>(tile);
            let (top, left) = (
                (down * F::STEP) as isize - 1,
                (across * F::STEP) as isize - 1,
            );
            let inside = |from: isize, size: usize| from >= 0 && from as usize + F::SIDE <= size;
            let (source, source_row) = if inside(top, call.height) && inside(left, call.width) {
                let at = (top as usize - call.input.first) * row + left as usize * channels;
                (call.input.data[at..].as_ptr(), row)
            } else {
                // SAFETY: the patch holds a tile.
                unsafe { self.copy_patch::<F>(top, left, patch) };
                (patch.cast_const(), F::SIDE * channels)
            };
            let int16 = conv.int16;
            input(
                conv.level,
                Input {
                    source,
                    pixel: channels,
                    row: source_row,
                    channels,
                    scratch: scratch.as_mut_ptr().cast(),
                    padded: sizes.padded,
                    target: factors.wrapping_add(tile * sizes.factor),
                    plane: sizes.factor_plane,
                    steps: if int16 {
                        steps.wrapping_add(tile * self.points)
                    } else {
                        std::ptr::null_mut()
                    },
                },
            );
        }
    }

    /// Copies the pixels under a tile, zeros where there are none.
    ///
    /// # Safety
    /// `patch` must hold `SIDE * SIDE` pixels.
    unsafe fn copy_patch<F: Form>(&self, top: isize, left: isize, patch: *mut f32) {
        let call = self.call;
        let channels = call.conv.inputs;
        // SAFETY: the caller's contract.
        let patch = unsafe { std::slice::from_raw_parts_mut(patch, F::SIDE * F::SIDE * channels) };
        for (at, pixel) in patch.chunks_exact_mut(channels).enumerate() {
            let (y, x) = (
                top + (at / F::SIDE) as isize,
                left + (at % F::SIDE) as isize,
            );
            let (height, width) = (call.height as isize, call.width as isize);
            if y < 0 || x < 0 || y >= height || x >= width {
                pixel.fill(0.0);
                continue;
            }
            let from = (y as usize - call.input.first) * call.width + x as usize;
            pixel.copy_from_slice(&call.input.data[from * channels..][..channels]);
        }
    }

    /// The products of one point and panel.
    ///
    /// # Safety
    /// `factor` and `product` must hold a row for each tile, their number rounded up to
    /// [`TILE_STEP`].
    unsafe fn multiply(&self, panel: Panel, point: usize, factor: *mut u8, product: *mut u8) {
        let (conv, sizes) = (self.call.conv, self.sizes);
        let weights = conv.weights.of(panel, point);
        let count = self.tiles.len();
        #[cfg(target_arch = "x86_64")]
        if conv.int16 {
            // SAFETY: `int16` is set where the machine has the instruction; rows beyond the last tile
            // are scratch of this block, whatever they hold.
            unsafe {
                product::int16(&product::Int16 {
                    rows: count.next_multiple_of(product::ROWS),
                    units: conv.weights.units(),
                    vectors: panel.vectors,
                    a: factor,
                    a_pitch: sizes.factor,
                    b: weights.as_ptr().cast(),
                    c: product,
                    c_pitch: sizes.product,
                    ahead: weights.as_ptr().wrapping_add(weights.len()).cast(),
                    ahead_lines: weights.len(),
                });
            }
            return;
        }
        let width = panel.vectors * LANES;
        // SAFETY: rows of the factor hold `padded` values and rows of the product a panel; all bit
        // patterns are values.
        let (factor, weights, product) = unsafe {
            (
                std::slice::from_raw_parts(factor.cast::<f32>(), count * sizes.padded),
                std::slice::from_raw_parts(weights.as_ptr().cast::<f32>(), weights.len() * LANES),
                std::slice::from_raw_parts_mut(product.cast::<f32>(), count * sizes.product / 4),
            )
        };
        multiply(
            conv.level,
            Size {
                m: count,
                vectors: width / conv.level.lanes(),
                k: conv.inputs,
            },
            Left::rows(factor, sizes.padded),
            Right::rows(conv.level, weights, width),
            Start::Zero,
            Out {
                data: product,
                row: sizes.product / 4,
            },
        );
    }
}

/// The outputs of a tile: the first one, and how many of them exist.
struct Place {
    target: *mut f32,
    row: usize,
    rows: usize,
    pixels: usize,
}
