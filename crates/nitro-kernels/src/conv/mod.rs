//! 2-D convolution over NHWC f32 activations, forward and both gradients.
//!
//! Weights are in the official PyTorch layout `[O, I / groups, kh, kw]`. Dense convolutions are products
//! whose operand A is never written out: the micro-kernel reads a padded copy of a few image rows, one
//! run of `kw * I` values per kernel row. 1 x 1 convolutions are plain products, depthwise ones run
//! directly over channels (always in f32), other groups one product per group.

mod depthwise;
mod direct;
mod grouped;
mod norm;
mod shortcut;
mod stages;
mod weight_grad;
mod winograd;

use std::ops::Range;

use crate::error::{KernelError, check_eq, check_len};
use crate::gemm::{self, Epilogue, KernelSet, MatRef, PackedB};
use crate::isa::{Isa, Precision};
use direct::{Direct, PackedDirect, Weights};
use grouped::PackedGroups;

pub use norm::Norm;
pub(crate) use norm::add_norm_rows;
pub use stages::{Entry, Head, ResidualBlock, Stage, Stages};
pub use winograd::{Finish, ImageRows, WinogradConv, WinogradForm};

/// The sizes of a convolution. Activations are `[batch, height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2d {
    /// Images.
    pub batch: usize,
    /// Input rows.
    pub height: usize,
    /// Input columns.
    pub width: usize,
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Kernel rows and columns.
    pub kernel: [usize; 2],
    /// Step between neighbouring outputs, in both directions.
    pub stride: usize,
    /// Zeros added on every side.
    pub padding: usize,
    /// Channel groups.
    pub groups: usize,
}

impl Conv2d {
    /// Output rows.
    pub fn out_height(&self) -> usize {
        extent(self.height, self.kernel[0], self.stride, self.padding)
    }

    /// Output columns.
    pub fn out_width(&self) -> usize {
        extent(self.width, self.kernel[1], self.stride, self.padding)
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        product(&[self.batch, self.height, self.width, self.in_channels])
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        product(&[
            self.batch,
            self.out_height(),
            self.out_width(),
            self.out_channels,
        ])
    }

    /// Elements of the weight.
    pub fn weight_len(&self) -> usize {
        let inputs = self.in_channels / self.groups.max(1);
        product(&[self.out_channels, inputs, self.kernel[0], self.kernel[1]])
    }

    /// Floating-point operations of one pass (two per multiply-add).
    pub fn flop(&self) -> f64 {
        2.0 * self.output_len() as f64 * (self.weight_len() / self.out_channels.max(1)) as f64
    }

    fn check(&self) -> Result<(), KernelError> {
        let unsupported = |what, value, help| Err(KernelError::Unsupported { what, value, help });
        if self.groups == 0 || !self.in_channels.is_multiple_of(self.groups) {
            return unsupported(
                "conv2d groups",
                self.groups,
                "it must divide the input channels",
            );
        }
        if !self.out_channels.is_multiple_of(self.groups) {
            return unsupported(
                "conv2d groups",
                self.groups,
                "it must divide the output channels",
            );
        }
        if self.in_channels == 0 || self.out_channels == 0 {
            return unsupported("conv2d channels", 0, "use 1 or more");
        }
        if self.stride == 0 {
            return unsupported("conv2d stride", 0, "use 1 or more");
        }
        for (kernel, size) in self.kernel.into_iter().zip([self.height, self.width]) {
            if kernel == 0 {
                return unsupported("conv2d kernel size", 0, "use 1 or more");
            }
            if self.padding >= kernel {
                let help = "padding must be smaller than the kernel";
                return unsupported("conv2d padding", self.padding, help);
            }
            if size.saturating_add(self.padding.saturating_mul(2)) < kernel {
                return unsupported("conv2d input size", size, "the kernel does not fit into it");
            }
        }
        Ok(())
    }

    fn kind(&self) -> Kind {
        if self.groups > 1 {
            if self.groups == self.in_channels && self.groups == self.out_channels {
                return Kind::Depthwise;
            }
            return Kind::Grouped;
        }
        if self.is_pointwise() {
            Kind::Pointwise
        } else {
            Kind::Dense
        }
    }

    fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1
    }

    fn pixels_in(&self) -> usize {
        self.batch * self.height * self.width
    }

    fn pixels_out(&self) -> usize {
        self.batch * self.out_height() * self.out_width()
    }
}

/// Saturating, so that absurd sizes fail the comparison with a slice's length.
fn product(sizes: &[usize]) -> usize {
    sizes
        .iter()
        .fold(1, |product, &size| product.saturating_mul(size))
}

fn extent(size: usize, kernel: usize, stride: usize, padding: usize) -> usize {
    size.saturating_add(padding.saturating_mul(2))
        .checked_sub(kernel)
        .map_or(0, |free| free / stride.max(1) + 1)
}

/// Which algorithm a convolution takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pointwise,
    Dense,
    Depthwise,
    Grouped,
}

/// Weights of a forward convolution, reordered (and rounded) once for many images of any size.
pub struct PackedConv2d {
    set: KernelSet,
    conv: Conv2d,
    weights: Packed,
}

enum Packed {
    Pointwise(PackedB),
    Dense(PackedDirect),
    Depthwise(Vec<f32>),
    /// One for each group; the kernel is 1 x 1.
    Groups(PackedGroups),
    /// One for each group, of any kernel.
    DenseGroups(Vec<PackedDirect>),
}

impl std::fmt::Debug for PackedConv2d {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedConv2d")
            .field("conv", &self.conv)
            .field("isa", &self.set.isa)
            .finish()
    }
}

impl PackedConv2d {
    /// Packs `weight` (`[O, I / groups, kh, kw]`) for the convolution described by `conv`; its batch,
    /// height and width do not matter here.
    ///
    /// # Errors
    /// If the sizes are not a convolution or the weight has another length.
    pub fn new(conv: &Conv2d, weight: &[f32], precision: Precision) -> Result<Self, KernelError> {
        PackedConv2d::with_isa(Isa::current(), conv, weight, precision)
    }

    /// [`PackedConv2d::new`] for a given instruction set.
    ///
    /// # Errors
    /// As [`PackedConv2d::new`].
    pub fn with_isa(
        isa: Isa,
        conv: &Conv2d,
        weight: &[f32],
        precision: Precision,
    ) -> Result<Self, KernelError> {
        // Any image the kernel fits into will do for the check.
        let conv = Conv2d {
            height: conv.height.max(conv.kernel[0]),
            width: conv.width.max(conv.kernel[1]),
            ..*conv
        };
        conv.check()?;
        check_eq("conv2d: weight elements", conv.weight_len(), weight.len())?;
        let set = KernelSet::new(isa, precision);
        let (inputs, outputs) = (
            conv.in_channels / conv.groups,
            conv.out_channels / conv.groups,
        );
        let [kh, kw] = conv.kernel;
        let weights = match conv.kind() {
            Kind::Pointwise => {
                let view = MatRef::row_major(weight, outputs, inputs)?.t();
                Packed::Pointwise(PackedB::with_isa(isa, view, precision))
            }
            Kind::Depthwise => Packed::Depthwise(depthwise::reorder(&conv, weight)),
            Kind::Grouped if conv.is_pointwise() => {
                Packed::Groups(PackedGroups::forward(&set, &conv, weight)?)
            }
            kind => {
                let mut groups = Vec::with_capacity(conv.groups);
                for weight in weight.chunks_exact(outputs * inputs * kh * kw) {
                    let weights = Weights {
                        data: weight,
                        n_stride: inputs * kh * kw,
                        channel_stride: kh * kw,
                        taps: (0..kh * kw).map(Some).collect(),
                    };
                    let kernel = conv.kernel;
                    groups.push(PackedDirect::new(&set, kernel, inputs, outputs, &weights));
                }
                match (kind, groups.pop()) {
                    (Kind::Dense, Some(only)) => Packed::Dense(only),
                    (_, last) => {
                        groups.extend(last);
                        Packed::DenseGroups(groups)
                    }
                }
            }
        };
        Ok(PackedConv2d { set, conv, weights })
    }

    /// The convolution of `x` (`[batch, height, width, I]`) into `out` (`[batch, oh, ow, O]`):
    /// `out = act((out if accumulate) + conv(x) + bias)`.
    ///
    /// # Errors
    /// If the kernel does not fit into the image or a slice has another length than its shape.
    pub fn forward(
        &self,
        x: &[f32],
        [batch, height, width]: [usize; 3],
        out: &mut [f32],
        accumulate: bool,
        epilogue: Epilogue<'_>,
    ) -> Result<(), KernelError> {
        let conv = Conv2d {
            batch,
            height,
            width,
            ..self.conv
        };
        conv.check()?;
        check_eq("conv2d: input elements", conv.input_len(), x.len())?;
        check_eq("conv2d: output elements", conv.output_len(), out.len())?;
        if let Some(bias) = epilogue.bias {
            check_eq("conv2d: bias values", conv.out_channels, bias.len())?;
        }
        if let Some(pre_activation) = &epilogue.pre_activation {
            check_len(
                "conv2d: pre-activation",
                conv.output_len(),
                pre_activation.len(),
            )?;
        }
        match &self.weights {
            Packed::Pointwise(weights) => {
                let a = MatRef::row_major(x, conv.pixels_in(), conv.in_channels)?;
                gemm::gemm_packed(a, weights, out, conv.out_channels, accumulate, epilogue)?;
            }
            Packed::Dense(weights) => {
                let direct = Direct::forward(&conv, 0, conv.in_channels, conv.out_channels);
                direct.run(&self.set, weights, x, out, accumulate, epilogue);
            }
            Packed::Depthwise(weights) => {
                depthwise::forward(self.set.isa, &conv, weights, x, out, accumulate, epilogue);
            }
            Packed::Groups(weights) => {
                weights.run(&self.set, x, conv.pixels_in(), out, accumulate, epilogue);
            }
            Packed::DenseGroups(weights) => {
                let Epilogue {
                    bias,
                    activation,
                    mut pre_activation,
                } = epilogue;
                let (inputs, outputs) = (
                    conv.in_channels / conv.groups,
                    conv.out_channels / conv.groups,
                );
                for (group, weights) in weights.iter().enumerate() {
                    let direct = Direct::forward(&conv, group, inputs, outputs);
                    let epilogue = Epilogue {
                        bias: bias.map(|bias| &bias[group * outputs..][..outputs]),
                        activation,
                        pre_activation: pre_activation.as_deref_mut(),
                    };
                    direct.run(&self.set, weights, x, out, accumulate, epilogue);
                }
            }
        }
        Ok(())
    }

    /// Channels of the input.
    pub fn inputs(&self) -> usize {
        self.conv.in_channels
    }

    /// Floating-point operations of one pass over images of this size (see [`Conv2d::flop`]).
    pub fn flop(&self, [batch, height, width]: [usize; 3]) -> f64 {
        let conv = Conv2d {
            batch,
            height,
            width,
            ..self.conv
        };
        conv.flop()
    }

    /// Height, width and channels of the result for an image of `height` x `width` pixels.
    pub fn output_dims(&self, [height, width]: [usize; 2]) -> [usize; 3] {
        let conv = Conv2d {
            height,
            width,
            ..self.conv
        };
        [conv.out_height(), conv.out_width(), conv.out_channels]
    }

    /// The input rows that output rows `rows` are computed from, of an image of `height` rows.
    pub fn rows_needed(&self, rows: Range<usize>, height: usize) -> Range<usize> {
        let Conv2d {
            stride,
            padding,
            kernel,
            ..
        } = self.conv;
        let from = (rows.start * stride).saturating_sub(padding).min(height);
        let to = (rows.end * stride + kernel[0])
            .saturating_sub(stride + padding)
            .clamp(from, height);
        from..to
    }

    /// Output rows `rows` of one image of `height` x `width` pixels, of which `input` holds at least
    /// [`rows_needed`](Self::rows_needed); `out` is those output rows. For dense convolutions that are
    /// larger than 1 x 1.
    ///
    /// # Errors
    /// If a slice has another length than its shape, rows are missing, or the convolution is another.
    pub fn forward_rows(
        &self,
        [height, width]: [usize; 2],
        input: ImageRows<'_>,
        rows: Range<usize>,
        out: &mut [f32],
        accumulate: bool,
        epilogue: Epilogue<'_>,
    ) -> Result<(), KernelError> {
        let conv = Conv2d {
            batch: 1,
            height,
            width,
            ..self.conv
        };
        conv.check()?;
        let Packed::Dense(weights) = &self.weights else {
            return Err(KernelError::Unsupported {
                what: "conv2d by rows, groups",
                value: conv.groups,
                help: "use a dense convolution that is larger than 1 x 1",
            });
        };
        let out_row = conv.out_width() * conv.out_channels;
        check_eq("conv2d: output elements", rows.len() * out_row, out.len())?;
        check_len("conv2d: output rows", rows.end, conv.out_height())?;
        let needed = self.rows_needed(rows.clone(), height);
        let row = width * conv.in_channels;
        check_len(
            "conv2d: input rows before the first",
            input.first,
            needed.start,
        )?;
        let held = input.data.len() / row.max(1);
        check_len("conv2d: input rows", needed.end - input.first, held)?;
        if let Some(bias) = epilogue.bias {
            check_eq("conv2d: bias values", conv.out_channels, bias.len())?;
        }
        if let Some(pre_activation) = &epilogue.pre_activation {
            check_len("conv2d: pre-activation", out.len(), pre_activation.len())?;
        }
        // The rows held are an image of their own: rows before it are zeros where they are missing,
        // rows skipped where it begins earlier.
        let whole = Direct::forward(&conv, 0, conv.in_channels, conv.out_channels);
        let direct = Direct {
            height: held.min(height - input.first),
            pad_top: (conv.padding + input.first) as isize - (rows.start * conv.stride) as isize,
            out_height: rows.len(),
            out_image: rows.len() * out_row,
            ..whole
        };
        direct.run(&self.set, weights, input.data, out, accumulate, epilogue);
        Ok(())
    }
}

/// `out = act((out if accumulate) + conv(x, weight) + bias)`.
///
/// `x` is `[batch, height, width, I]`, `weight` `[O, I / groups, kh, kw]`, `out` `[batch, oh, ow, O]`.
/// For weights that do not change between calls, [`PackedConv2d`] saves the reordering.
///
/// # Errors
/// If the sizes are not a convolution or a slice has another length than its shape.
pub fn conv2d_forward(
    conv: &Conv2d,
    x: &[f32],
    weight: &[f32],
    out: &mut [f32],
    accumulate: bool,
    epilogue: Epilogue<'_>,
    precision: Precision,
) -> Result<(), KernelError> {
    conv2d_forward_with_isa(
        Isa::current(),
        conv,
        x,
        weight,
        out,
        accumulate,
        epilogue,
        precision,
    )
}

/// [`conv2d_forward`] on a given instruction set.
///
/// # Errors
/// As [`conv2d_forward`].
pub fn conv2d_forward_with_isa(
    isa: Isa,
    conv: &Conv2d,
    x: &[f32],
    weight: &[f32],
    out: &mut [f32],
    accumulate: bool,
    epilogue: Epilogue<'_>,
    precision: Precision,
) -> Result<(), KernelError> {
    conv.check()?;
    let size = [conv.batch, conv.height, conv.width];
    PackedConv2d::with_isa(isa, conv, weight, precision)?
        .forward(x, size, out, accumulate, epilogue)
}

/// The gradient of the input: `grad_x = conv_transpose(grad_out, weight)`, all of `grad_x` written.
///
/// # Errors
/// If the sizes are not a convolution or a slice has another length than its shape.
pub fn conv2d_backward_input(
    conv: &Conv2d,
    grad_out: &[f32],
    weight: &[f32],
    grad_x: &mut [f32],
    precision: Precision,
) -> Result<(), KernelError> {
    conv2d_backward_input_with_isa(Isa::current(), conv, grad_out, weight, grad_x, precision)
}

/// [`conv2d_backward_input`] on a given instruction set.
///
/// # Errors
/// As [`conv2d_backward_input`].
pub fn conv2d_backward_input_with_isa(
    isa: Isa,
    conv: &Conv2d,
    grad_out: &[f32],
    weight: &[f32],
    grad_x: &mut [f32],
    precision: Precision,
) -> Result<(), KernelError> {
    conv.check()?;
    check_eq(
        "conv2d: output gradient elements",
        conv.output_len(),
        grad_out.len(),
    )?;
    check_eq("conv2d: weight elements", conv.weight_len(), weight.len())?;
    check_eq(
        "conv2d: input gradient elements",
        conv.input_len(),
        grad_x.len(),
    )?;
    let set = KernelSet::new(isa, precision);
    let (inputs, outputs) = (
        conv.in_channels / conv.groups,
        conv.out_channels / conv.groups,
    );
    match conv.kind() {
        Kind::Pointwise => {
            let a = MatRef::row_major(grad_out, conv.pixels_out(), outputs)?;
            let b = MatRef::row_major(weight, outputs, inputs)?;
            let none = Epilogue::default();
            gemm::gemm_with_isa(isa, a, b, grad_x, inputs, false, none, precision)?;
        }
        Kind::Depthwise if conv.stride == 1 => {
            let weights = depthwise::reorder_flipped(conv, weight);
            let [kh, kw] = conv.kernel;
            // The gradient is itself a convolution, with the complementary padding; it is written
            // for square kernels, where that padding is the same in both directions.
            if kh == kw {
                let flipped = Conv2d {
                    height: conv.out_height(),
                    width: conv.out_width(),
                    padding: kh - 1 - conv.padding,
                    ..*conv
                };
                let none = Epilogue::default();
                depthwise::forward(set.isa, &flipped, &weights, grad_out, grad_x, false, none);
            } else {
                depthwise::backward_input_strided(set.isa, conv, weight, grad_out, grad_x);
            }
        }
        Kind::Depthwise => {
            depthwise::backward_input_strided(set.isa, conv, weight, grad_out, grad_x);
        }
        Kind::Grouped if conv.is_pointwise() => {
            let none = Epilogue::default();
            PackedGroups::backward(&set, conv, weight)?.run(
                &set,
                grad_out,
                conv.pixels_out(),
                grad_x,
                false,
                none,
            );
        }
        _ => {
            let [kh, kw] = conv.kernel;
            for (group, weight) in weight.chunks_exact(outputs * inputs * kh * kw).enumerate() {
                direct::backward_input(&set, conv, group, weight, grad_out, grad_x);
            }
        }
    }
    Ok(())
}

/// The gradient of the weight: `grad_weight (+)= sum over pixels of grad_out x patch of x`, in the
/// official layout. For the gradient of a bias, see [`crate::gemm::column_sum`].
///
/// # Errors
/// If the sizes are not a convolution or a slice has another length than its shape.
pub fn conv2d_backward_weight(
    conv: &Conv2d,
    x: &[f32],
    grad_out: &[f32],
    grad_weight: &mut [f32],
    accumulate: bool,
    precision: Precision,
) -> Result<(), KernelError> {
    let isa = Isa::current();
    conv2d_backward_weight_with_isa(isa, conv, x, grad_out, grad_weight, accumulate, precision)
}

/// [`conv2d_backward_weight`] on a given instruction set.
///
/// # Errors
/// As [`conv2d_backward_weight`].
pub fn conv2d_backward_weight_with_isa(
    isa: Isa,
    conv: &Conv2d,
    x: &[f32],
    grad_out: &[f32],
    grad_weight: &mut [f32],
    accumulate: bool,
    precision: Precision,
) -> Result<(), KernelError> {
    conv.check()?;
    check_eq("conv2d: input elements", conv.input_len(), x.len())?;
    check_eq(
        "conv2d: output gradient elements",
        conv.output_len(),
        grad_out.len(),
    )?;
    check_eq(
        "conv2d: weight gradient elements",
        conv.weight_len(),
        grad_weight.len(),
    )?;
    let set = KernelSet::new(isa, precision);
    let (inputs, outputs) = (
        conv.in_channels / conv.groups,
        conv.out_channels / conv.groups,
    );
    match conv.kind() {
        Kind::Pointwise => {
            let a = MatRef::row_major(grad_out, conv.pixels_out(), outputs)?.t();
            let b = MatRef::row_major(x, conv.pixels_in(), inputs)?;
            let none = Epilogue::default();
            gemm::gemm_with_isa(isa, a, b, grad_weight, inputs, accumulate, none, precision)?;
        }
        Kind::Depthwise => {
            depthwise::backward_weight(set.isa, conv, x, grad_out, grad_weight, accumulate);
        }
        Kind::Grouped if conv.is_pointwise() => {
            grouped::backward_weight(&set, conv, x, grad_out, grad_weight, accumulate)?;
        }
        _ => {
            let [kh, kw] = conv.kernel;
            let size = outputs * inputs * kh * kw;
            for (group, grad) in grad_weight.chunks_exact_mut(size).enumerate() {
                weight_grad::run(&set, conv, group, x, grad_out, grad, accumulate);
            }
        }
    }
    Ok(())
}
