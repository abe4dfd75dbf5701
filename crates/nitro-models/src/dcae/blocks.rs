//! The blocks that DC-AE's stages are made of. Images are channel-last, `[b, h, w, c]`, throughout.

use std::sync::Arc;

use burn::tensor::Tensor;
use nitro_ops::{
    Activation, EfficientVit, pixel_shuffle, pixel_unshuffle, relu_linear_attention,
    run_efficient_vit, silu_gated, upsample_nearest_2x,
};

use super::config::{BlockType, Downsample, Stage, Upsample};
use super::packed;
use crate::layers::{Conv2d, ConvSpec, Linear, RmsNorm};
use crate::{Params, WeightError};

/// Every RMS norm of DC-AE.
pub(super) const NORM_EPS: f64 = 1e-5;
/// Keeps the linear attention's denominator from zero where ReLU leaves nothing.
const ATTENTION_EPS: f64 = 1e-15;
/// Hidden channels of the gated convolution, per input channel.
pub(super) const GLU_RATIO: usize = 4;

/// One entry of a stage's `Sequential`.
#[derive(Clone, Debug)]
pub(super) enum Block {
    Res(Box<ResBlock>),
    EfficientViT(Box<EfficientViTBlock>),
    /// The same in a model for inference.
    Packed(Arc<EfficientVit>),
    Down(DownBlock),
    Up(UpBlock),
}

impl Block {
    /// A block of `stage`'s kind.
    pub(super) fn new(p: &Params<'_>, stage: &Stage, head_dim: usize) -> Result<Self, WeightError> {
        Ok(match stage.block {
            BlockType::ResBlock => Self::Res(Box::new(ResBlock::new(p, stage)?)),
            BlockType::EfficientViTBlock if p.packs() => {
                Self::Packed(Arc::new(packed::efficient_vit(p, stage, head_dim)?))
            }
            BlockType::EfficientViTBlock => {
                Self::EfficientViT(Box::new(EfficientViTBlock::new(p, stage, head_dim)?))
            }
        })
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Res(block) => block.forward(x),
            Self::EfficientViT(block) => block.forward(x),
            Self::Packed(block) => run_efficient_vit(x, block),
            Self::Down(block) => block.forward(x),
            Self::Up(block) => block.forward(x),
        }
    }
}

/// `x + norm(conv(act(conv(x))))`.
#[derive(Clone, Debug)]
pub(super) struct ResBlock {
    conv1: Conv2d,
    conv2: Conv2d,
    norm: RmsNorm,
    activation: Activation,
}

impl ResBlock {
    fn new(p: &Params<'_>, stage: &Stage) -> Result<Self, WeightError> {
        let c = stage.channels;
        Ok(Self {
            conv1: Conv2d::new(&p.sub("conv1"), ConvSpec::new(c, c, 3))?,
            conv2: Conv2d::new(
                &p.sub("conv2"),
                ConvSpec {
                    bias: false,
                    ..ConvSpec::new(c, c, 3)
                },
            )?,
            norm: RmsNorm::with_bias(&p.sub("norm"), c, NORM_EPS)?,
            activation: stage.activation,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.conv1.forward_with(x.clone(), self.activation); // [b, h, w, c]
        x + self.norm.forward(self.conv2.forward(y))
    }
}

/// Linear attention, then a gated convolution; each with its own residual.
#[derive(Clone, Debug)]
pub(super) struct EfficientViTBlock {
    attn: MultiscaleLinearAttention,
    conv_out: GluMbConv,
}

impl EfficientViTBlock {
    fn new(p: &Params<'_>, stage: &Stage, head_dim: usize) -> Result<Self, WeightError> {
        Ok(Self {
            attn: MultiscaleLinearAttention::new(&p.sub("attn"), stage, head_dim)?,
            conv_out: GluMbConv::new(&p.sub("conv_out"), stage.channels)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv_out.forward(self.attn.forward(x))
    }
}

/// ReLU linear attention over the pixels (`SanaMultiscaleLinearAttention`).
///
/// Besides the plain q, k and v, each scale attends with copies mixed over a neighbourhood. Heads
/// are cut from the channels of `q|k|v` laid end to end: a head's q, k and v are three consecutive
/// runs of `head_dim` of them, wherever those come from.
#[derive(Clone, Debug)]
struct MultiscaleLinearAttention {
    to_qkv: Linear,
    scales: Vec<QkvScale>,
    to_out: Linear,
    norm_out: RmsNorm,
    head_dim: usize,
}

impl MultiscaleLinearAttention {
    fn new(p: &Params<'_>, stage: &Stage, head_dim: usize) -> Result<Self, WeightError> {
        let c = stage.channels;
        let scales = stage.scales.iter().enumerate().map(|(i, &kernel)| {
            QkvScale::new(&p.sub("to_qkv_multiscale").sub(i), 3 * c, kernel, head_dim)
        });
        let scales = scales.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            to_qkv: Linear::stacked(p, &["to_q", "to_k", "to_v"], c, c)?,
            to_out: Linear::without_bias(&p.sub("to_out"), c * (1 + scales.len()), c)?,
            norm_out: RmsNorm::with_bias(&p.sub("norm_out"), c, NORM_EPS)?,
            scales,
            head_dim,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, h, w, _] = x.dims();
        let qkv = self.to_qkv.forward(x.clone()); // [b, h, w, 3c]
        let mut all = vec![qkv.clone()];
        all.extend(self.scales.iter().map(|scale| scale.forward(qkv.clone())));
        let qkv = Tensor::cat(all, 3); // [b, h, w, 3c (1 + scales)]
        let [.., channels] = qkv.dims();
        let y = relu_linear_attention(
            qkv.reshape([b, h * w, channels]),
            self.head_dim,
            ATTENTION_EPS,
        ); // [b, h w, c (1 + scales)]
        let y = self.to_out.forward(y.reshape([b, h, w, channels / 3])); // [b, h, w, c]
        x + self.norm_out.forward(y)
    }
}

/// A copy of q, k and v that sees a neighbourhood: depthwise, then mixed within each head.
#[derive(Clone, Debug)]
struct QkvScale {
    proj_in: Conv2d,
    proj_out: Conv2d,
}

impl QkvScale {
    fn new(p: &Params<'_>, c: usize, kernel: usize, head_dim: usize) -> Result<Self, WeightError> {
        let depthwise = ConvSpec {
            groups: c,
            bias: false,
            ..ConvSpec::new(c, c, kernel)
        };
        let grouped = ConvSpec {
            groups: c / head_dim,
            bias: false,
            ..ConvSpec::new(c, c, 1)
        };
        Ok(Self {
            proj_in: Conv2d::new(&p.sub("proj_in"), depthwise)?,
            proj_out: Conv2d::new(&p.sub("proj_out"), grouped)?,
        })
    }

    fn forward(&self, qkv: Tensor<4>) -> Tensor<4> {
        self.proj_out.forward(self.proj_in.forward(qkv))
    }
}

/// The gated depthwise convolution that stands where a transformer has its MLP (`GLUMBConv`).
#[derive(Clone, Debug)]
struct GluMbConv {
    conv_inverted: Linear,
    conv_depth: Conv2d,
    conv_point: Linear,
    norm: RmsNorm,
    hidden: usize,
}

impl GluMbConv {
    fn new(p: &Params<'_>, c: usize) -> Result<Self, WeightError> {
        let hidden = GLU_RATIO * c;
        let depthwise = ConvSpec {
            groups: 2 * hidden,
            ..ConvSpec::new(2 * hidden, 2 * hidden, 3)
        };
        Ok(Self {
            conv_inverted: Linear::pointwise(&p.sub("conv_inverted"), c, 2 * hidden, true)?,
            conv_depth: Conv2d::new(&p.sub("conv_depth"), depthwise)?,
            conv_point: Linear::pointwise(&p.sub("conv_point"), hidden, c, false)?,
            norm: RmsNorm::with_bias(&p.sub("norm"), c, NORM_EPS)?,
            hidden,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.conv_inverted.forward_with(x.clone(), Activation::Silu); // [b, h, w, 2 hidden]
        let y = self.conv_depth.forward(y);
        let value = y.clone().slice_dim(3, 0..self.hidden);
        let gate = y.slice_dim(3, self.hidden..2 * self.hidden);
        let y = self.conv_point.forward(silu_gated(value, gate)); // [b, h, w, c]
        x + self.norm.forward(y)
    }
}

/// Halves the resolution: `[b, h, w, in] -> [b, h / 2, w / 2, out]`.
#[derive(Clone, Debug)]
pub(super) struct DownBlock {
    conv: Conv2d,
    kind: Downsample,
    /// Channels averaged into one by the shortcut, if there is a shortcut.
    shortcut: Option<usize>,
}

impl DownBlock {
    pub(super) fn new(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        kind: Downsample,
        shortcut: bool,
    ) -> Result<Self, WeightError> {
        let spec = match kind {
            Downsample::Conv => ConvSpec {
                stride: 2,
                ..ConvSpec::new(inputs, outputs, 3)
            },
            Downsample::PixelUnshuffle if outputs.is_multiple_of(4) => {
                ConvSpec::new(inputs, outputs / 4, 3)
            }
            Downsample::PixelUnshuffle => {
                return Err(WeightError::Config {
                    origin: p.name("conv"),
                    reason: format!(
                        "pixel_unshuffle needs a multiple of 4 channels, not {outputs}"
                    ),
                });
            }
        };
        let conv = Conv2d::new(&p.sub("conv"), spec)?;
        Ok(Self {
            conv,
            kind,
            shortcut: shortcut.then_some(inputs * 4 / outputs),
        })
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.conv.forward(x.clone());
        let y = match self.kind {
            Downsample::Conv => y,
            Downsample::PixelUnshuffle => pixel_unshuffle(y, 2),
        };
        match self.shortcut {
            Some(group) => y + average_channels(pixel_unshuffle(x, 2), group),
            None => y,
        }
    }
}

/// Doubles the resolution: `[b, h, w, in] -> [b, 2 h, 2 w, out]`.
#[derive(Clone, Debug)]
pub(super) struct UpBlock {
    conv: Conv2d,
    kind: Upsample,
    /// Copies of each channel made by the shortcut, if there is a shortcut.
    shortcut: Option<usize>,
}

impl UpBlock {
    pub(super) fn new(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        kind: Upsample,
        shortcut: bool,
    ) -> Result<Self, WeightError> {
        let conv_outputs = match kind {
            Upsample::Interpolate => outputs,
            Upsample::PixelShuffle => outputs * 4,
        };
        let conv = Conv2d::new(&p.sub("conv"), ConvSpec::new(inputs, conv_outputs, 3))?;
        Ok(Self {
            conv,
            kind,
            shortcut: shortcut.then_some(outputs * 4 / inputs),
        })
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = match self.kind {
            Upsample::Interpolate => self.conv.forward(upsample_nearest_2x(x.clone())),
            Upsample::PixelShuffle => pixel_shuffle(self.conv.forward(x.clone()), 2),
        };
        match self.shortcut {
            Some(copies) => y + pixel_shuffle(repeat_channels(x, copies), 2),
            None => y,
        }
    }
}

/// Means of runs of `group` consecutive channels: `[b, h, w, c] -> [b, h, w, c / group]`.
pub(super) fn average_channels(x: Tensor<4>, group: usize) -> Tensor<4> {
    if group == 1 {
        return x;
    }
    let [b, h, w, c] = x.dims();
    x.reshape([b * h * w, c / group, group])
        .mean_dim(2)
        .reshape([b, h, w, c / group])
}

/// Each channel `copies` times in a row: `[b, h, w, c] -> [b, h, w, c copies]`.
pub(super) fn repeat_channels(x: Tensor<4>, copies: usize) -> Tensor<4> {
    if copies == 1 {
        return x;
    }
    let [b, h, w, c] = x.dims();
    x.unsqueeze_dim::<5>(4)
        .expand([b, h, w, c, copies])
        .reshape([b, h, w, c * copies])
}
