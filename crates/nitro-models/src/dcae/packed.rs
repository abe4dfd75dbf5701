//! An autoencoder for inference, over packed weights: the fine stages, residual blocks at high
//! resolution, run in bands of rows ([`nitro_ops::Stages`]); the blocks of the coarse ones as a whole.

use nitro_ops::{
    EfficientVit, EfficientVitWeights, Entry, Head, KernelError, MixedScale, Norm, ResidualBlock,
    Stage as PackedStage, Stages, WinogradConv, WinogradForm,
};

use super::blocks::{GLU_RATIO, NORM_EPS};
use super::config::{ActFn, BlockType, DcaeConfig, Downsample, Stage, Upsample};
use crate::layers::{ConvSpec, pack_linear};
use crate::{Init, Params, WeightError};

/// How many of the decoder's stages, the finest first, can be run in bands.
pub(super) fn decoder_stages(config: &DcaeConfig, stages: &[Stage]) -> usize {
    match config.upsample_block_type {
        Upsample::Interpolate => fine(stages),
        Upsample::PixelShuffle => 0,
    }
}

/// How many of the encoder's stages, the finest first, can be run in bands.
pub(super) fn encoder_stages(config: &DcaeConfig, stages: &[Stage]) -> usize {
    match config.downsample_block_type {
        Downsample::Conv => fine(stages),
        Downsample::PixelUnshuffle => 0,
    }
}

fn fine(stages: &[Stage]) -> usize {
    let fine = |stage: &&Stage| stage.block == BlockType::ResBlock && stage.layers > 0;
    stages.iter().take_while(fine).count()
}

/// The finest `count` of the decoder's stages, and what follows them.
pub(super) fn decoder(
    p: &Params<'_>,
    stages: &[Stage],
    count: usize,
    activation: ActFn,
    image: usize,
) -> Result<Stages, WeightError> {
    let mut packed = Vec::with_capacity(count);
    for (i, stage) in stages.iter().enumerate().take(count).rev() {
        let p = p.sub("up_blocks").sub(i);
        let entry = match stages.get(i + 1) {
            Some(coarser) => {
                let p = p.sub(0).sub("conv");
                Entry::Doubled {
                    conv: winograd(&p, WinogradForm::Doubled, coarser.channels, stage.channels)?,
                    bias: bias(&p, coarser.channels, stage.channels)?,
                    shortcut: true,
                }
            }
            None => Entry::Same(stage.channels),
        };
        let first = usize::from(i + 1 < stages.len());
        packed.push(PackedStage {
            entry,
            blocks: blocks(&p, first, stage)?,
        });
    }
    let width = stages[0].channels;
    let (norm, conv) = (p.sub("norm_out"), p.sub("conv_out"));
    let (conv, bias) = ConvSpec::new(width, image, 3).pack(&conv)?;
    let head = Head {
        norm: rms_norm(&norm, width)?,
        activation: activation.activation(),
        conv,
        bias: bias.unwrap_or_default(),
    };
    Stages::new(packed, Some(head)).map_err(|error| unfit(p, &error))
}

/// The finest `count` of the encoder's stages, from the image to the downsampling behind them.
pub(super) fn encoder(
    p: &Params<'_>,
    stages: &[Stage],
    count: usize,
    image: usize,
) -> Result<Stages, WeightError> {
    let entry = |p: &Params<'_>, spec: ConvSpec, shortcut| {
        let (conv, bias) = spec.pack(p)?;
        Ok::<_, WeightError>(Entry::Conv {
            conv,
            bias: bias.unwrap_or_default(),
            shortcut,
        })
    };
    let first = ConvSpec::new(image, stages[0].channels, 3);
    let mut next = entry(&p.sub("conv_in"), first, false)?;
    let mut packed = Vec::with_capacity(count + 1);
    for (i, stage) in stages.iter().enumerate().take(count) {
        let p = p.sub("down_blocks").sub(i);
        packed.push(PackedStage {
            entry: next,
            blocks: blocks(&p, 0, stage)?,
        });
        let Some(coarser) = stages.get(i + 1) else {
            return Stages::new(packed, None).map_err(|error| unfit(&p, &error));
        };
        let spec = ConvSpec {
            stride: 2,
            ..ConvSpec::new(stage.channels, coarser.channels, 3)
        };
        next = entry(&p.sub(stage.layers).sub("conv"), spec, true)?;
    }
    packed.push(PackedStage {
        entry: next,
        blocks: Vec::new(),
    });
    Stages::new(packed, None).map_err(|error| unfit(p, &error))
}

/// A stage's residual blocks, from number `first` on.
fn blocks(p: &Params<'_>, first: usize, stage: &Stage) -> Result<Vec<ResidualBlock>, WeightError> {
    let c = stage.channels;
    (first..first + stage.layers)
        .map(|i| {
            let p = p.sub(i);
            let norm = p.sub("norm");
            Ok(ResidualBlock {
                conv1: winograd(&p.sub("conv1"), WinogradForm::Same, c, c)?,
                bias1: bias(&p.sub("conv1"), c, c)?,
                activation: stage.activation,
                conv2: winograd(&p.sub("conv2"), WinogradForm::Same, c, c)?,
                norm: rms_norm(&norm, c)?,
            })
        })
        .collect()
}

/// A block of a coarse stage.
pub(super) fn efficient_vit(
    p: &Params<'_>,
    stage: &Stage,
    head_dim: usize,
) -> Result<EfficientVit, WeightError> {
    let (c, hidden) = (stage.channels, GLU_RATIO * stage.channels);
    let (attn, glu) = (p.sub("attn"), p.sub("conv_out"));
    let [q, k, v] = ["to_q", "to_k", "to_v"].map(|name| attn.sub(name));
    let scales = stage.scales.iter().enumerate().map(|(i, &kernel)| {
        let p = attn.sub("to_qkv_multiscale").sub(i);
        let conv = |name, kernel, groups| {
            let spec = ConvSpec {
                groups,
                bias: false,
                ..ConvSpec::new(3 * c, 3 * c, kernel)
            };
            Ok::<_, WeightError>(spec.pack(&p.sub(name))?.0)
        };
        Ok::<_, WeightError>(MixedScale {
            depthwise: conv("proj_in", kernel, 3 * c)?,
            grouped: conv("proj_out", 1, 3 * c / head_dim)?,
        })
    });
    let scales = scales.collect::<Result<Vec<_>, _>>()?;
    let depth = glu.sub("conv_depth");
    let spec = ConvSpec {
        groups: 2 * hidden,
        ..ConvSpec::new(2 * hidden, 2 * hidden, 3)
    };
    let weights = EfficientVitWeights {
        head_dim,
        qkv: pack_linear(&[(&q, c), (&k, c), (&v, c)], &[c], false)?,
        out: pack_linear(
            &[(&attn.sub("to_out"), c)],
            &[c * (1 + scales.len())],
            false,
        )?,
        scales,
        out_norm: rms_norm(&attn.sub("norm_out"), c)?,
        inverted: pack_linear(&[(&glu.sub("conv_inverted"), 2 * hidden)], &[c, 1, 1], true)?,
        depthwise: depth.values("weight", &[2 * hidden, 1, 3, 3], spec.init())?,
        depthwise_bias: depth.values("bias", &[2 * hidden], spec.init())?,
        point: pack_linear(&[(&glu.sub("conv_point"), c)], &[hidden, 1, 1], false)?,
        norm: rms_norm(&glu.sub("norm"), c)?,
    };
    EfficientVit::new(weights).map_err(|error| unfit(p, &error))
}

fn winograd(
    p: &Params<'_>,
    form: WinogradForm,
    inputs: usize,
    outputs: usize,
) -> Result<WinogradConv, WeightError> {
    let (init, precision) = (ConvSpec::new(inputs, outputs, 3).init(), p.precision());
    let (name, shape) = (p.name("weight"), [outputs, inputs, 3, 3]);
    let misshapen = |error| p.misshapen("weight", &error);
    let packed_form =
        WinogradConv::packed_form(form, [outputs, inputs], precision).map_err(misshapen)?;
    if let Some(bytes) = p.kept(&name, &packed_form) {
        p.verify("weight", &shape, init)?;
        return WinogradConv::from_packed(form, [outputs, inputs], precision, bytes)
            .map_err(misshapen);
    }
    let weight = p.values("weight", &shape, init)?;
    let conv = WinogradConv::new(form, [outputs, inputs], &weight, precision).map_err(misshapen)?;
    p.keep(&name, &packed_form, conv.packed());
    Ok(conv)
}

pub(super) fn rms_norm(p: &Params<'_>, width: usize) -> Result<Norm, WeightError> {
    Ok(Norm {
        weight: p.values("weight", &[width], Init::Ones)?,
        bias: p.values("bias", &[width], Init::Zeros)?,
        eps: NORM_EPS as f32,
    })
}

fn bias(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Vec<f32>, WeightError> {
    p.values("bias", &[outputs], ConvSpec::new(inputs, outputs, 3).init())
}

/// Stages whose channels do not fit each other: the configuration contradicts itself.
fn unfit(p: &Params<'_>, error: &KernelError) -> WeightError {
    p.misshapen("weight", error)
}
