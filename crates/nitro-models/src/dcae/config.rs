//! What a DC-AE is made of, as in the `config.json` of a diffusers folder.

use burn::tensor::{Tensor, activation};
use nitro_ops::{Activation, silu};
use serde::{Deserialize, Serialize};

use crate::WeightError;

/// The configuration of an [`crate::dcae::Dcae`]: diffusers' `AutoencoderDC`, keys and defaults.
///
/// Stage 0 works at the image's resolution, each further stage at half the one before. Keys that
/// are not listed here are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DcaeConfig {
    /// Image channels.
    pub in_channels: usize,
    /// Latent channels.
    pub latent_channels: usize,
    /// Channels of an attention head.
    pub attention_head_dim: usize,
    /// Kind of block, per encoder stage.
    pub encoder_block_types: PerStage<BlockType>,
    /// Kind of block, per decoder stage.
    pub decoder_block_types: PerStage<BlockType>,
    /// Width of each encoder stage.
    pub encoder_block_out_channels: Vec<usize>,
    /// Width of each decoder stage.
    pub decoder_block_out_channels: Vec<usize>,
    /// Blocks of each encoder stage.
    pub encoder_layers_per_block: Vec<usize>,
    /// Blocks of each decoder stage.
    pub decoder_layers_per_block: Vec<usize>,
    /// Kernel sizes of the multi-scale attention, per encoder stage.
    pub encoder_qkv_multiscales: Vec<Vec<usize>>,
    /// Kernel sizes of the multi-scale attention, per decoder stage.
    pub decoder_qkv_multiscales: Vec<Vec<usize>>,
    /// How the decoder doubles its resolution.
    pub upsample_block_type: Upsample,
    /// How the encoder halves its resolution.
    pub downsample_block_type: Downsample,
    /// Norm, per decoder stage.
    pub decoder_norm_types: PerStage<NormType>,
    /// Activation of the residual blocks, per decoder stage.
    pub decoder_act_fns: PerStage<ActFn>,
    /// Activation before the decoder's last convolution.
    pub decoder_conv_act_fn: ActFn,
    /// Whether the encoder's last convolution has a channel-averaging shortcut.
    pub encoder_out_shortcut: bool,
    /// Whether the decoder's first convolution has a channel-repeating shortcut.
    pub decoder_in_shortcut: bool,
    /// The denoiser sees `latent * scaling_factor`, which has unit variance.
    pub scaling_factor: f64,
}

impl Default for DcaeConfig {
    fn default() -> Self {
        let scales = vec![vec![], vec![], vec![], vec![5], vec![5], vec![5]];
        Self {
            in_channels: 3,
            latent_channels: 32,
            attention_head_dim: 32,
            encoder_block_types: PerStage::All(BlockType::ResBlock),
            decoder_block_types: PerStage::All(BlockType::ResBlock),
            encoder_block_out_channels: vec![128, 256, 512, 512, 1024, 1024],
            decoder_block_out_channels: vec![128, 256, 512, 512, 1024, 1024],
            encoder_layers_per_block: vec![2, 2, 2, 3, 3, 3],
            decoder_layers_per_block: vec![3, 3, 3, 3, 3, 3],
            encoder_qkv_multiscales: scales.clone(),
            decoder_qkv_multiscales: scales,
            upsample_block_type: Upsample::PixelShuffle,
            downsample_block_type: Downsample::PixelUnshuffle,
            decoder_norm_types: PerStage::All(NormType::RmsNorm),
            decoder_act_fns: PerStage::All(ActFn::Silu),
            decoder_conv_act_fn: ActFn::Relu,
            encoder_out_shortcut: true,
            decoder_in_shortcut: true,
            scaling_factor: 1.0,
        }
    }
}

impl DcaeConfig {
    /// The autoencoder of the miniature: 8 latent channels at 1/8 resolution, sized so that two CPU
    /// cores can train it on 128 px images. 1.33M parameters (encoder 0.51M, decoder 0.82M); an
    /// image takes 0.74 GFLOP to encode and 1.24 to decode. The scaling factor is the trainer's to
    /// set.
    pub fn miniature() -> Self {
        use BlockType::{EfficientViTBlock as Vit, ResBlock as Res};
        let blocks = PerStage::Each(vec![Res, Res, Res, Vit]);
        let scales = vec![vec![], vec![], vec![], vec![5]];
        Self {
            latent_channels: 8,
            attention_head_dim: 16,
            encoder_block_types: blocks.clone(),
            decoder_block_types: blocks,
            encoder_block_out_channels: vec![16, 32, 64, 128],
            decoder_block_out_channels: vec![16, 32, 64, 128],
            encoder_layers_per_block: vec![1, 1, 1, 1],
            decoder_layers_per_block: vec![1, 1, 1, 2],
            encoder_qkv_multiscales: scales.clone(),
            decoder_qkv_multiscales: scales,
            upsample_block_type: Upsample::Interpolate,
            downsample_block_type: Downsample::Conv,
            ..Self::default()
        }
    }

    /// Nitro-E's autoencoder, the f32c32 one of Sana 1.0 (312M parameters), as its published
    /// `config.json` has it.
    pub fn sana_f32c32() -> Self {
        use BlockType::{EfficientViTBlock as Vit, ResBlock as Res};
        let blocks = PerStage::Each(vec![Res, Res, Res, Vit, Vit, Vit]);
        Self {
            encoder_block_types: blocks.clone(),
            decoder_block_types: blocks,
            upsample_block_type: Upsample::Interpolate,
            downsample_block_type: Downsample::Conv,
            scaling_factor: 0.41407,
            ..Self::default()
        }
    }

    /// Image pixels per latent pixel, in each direction.
    pub fn spatial_factor(&self) -> usize {
        1 << (self.encoder_block_out_channels.len().max(1) - 1)
    }

    /// The encoder's stages, first to last.
    pub(super) fn encoder_stages(&self) -> Result<Vec<Stage>, WeightError> {
        self.stages(Side {
            name: "encoder",
            channels: &self.encoder_block_out_channels,
            layers: &self.encoder_layers_per_block,
            blocks: &self.encoder_block_types,
            scales: &self.encoder_qkv_multiscales,
            norms: &PerStage::All(NormType::RmsNorm),
            activations: &PerStage::All(ActFn::Silu),
        })
    }

    /// The decoder's stages, at full resolution first.
    pub(super) fn decoder_stages(&self) -> Result<Vec<Stage>, WeightError> {
        self.stages(Side {
            name: "decoder",
            channels: &self.decoder_block_out_channels,
            layers: &self.decoder_layers_per_block,
            blocks: &self.decoder_block_types,
            scales: &self.decoder_qkv_multiscales,
            norms: &self.decoder_norm_types,
            activations: &self.decoder_act_fns,
        })
    }

    fn stages(&self, side: Side<'_>) -> Result<Vec<Stage>, WeightError> {
        let name = side.name;
        let count = side.channels.len();
        if count < 2 {
            return invalid(format!(
                "{name}_block_out_channels lists {count} stages; at least 2 are needed"
            ));
        }
        for (key, found) in [
            ("layers_per_block", Some(side.layers.len())),
            ("qkv_multiscales", Some(side.scales.len())),
            ("block_types", side.blocks.len()),
            ("norm_types", side.norms.len()),
            ("act_fns", side.activations.len()),
        ] {
            if found.is_some_and(|found| found != count) {
                return invalid(format!(
                    "{name}_{key} has {} entries, {name}_block_out_channels has {count}",
                    found.unwrap_or_default()
                ));
            }
        }
        let stages = (0..count).map(|i| {
            let stage = Stage {
                channels: side.channels[i],
                layers: side.layers[i],
                block: side.blocks.get(i),
                scales: side.scales[i].clone(),
                activation: side.activations.get(i).activation(),
            };
            if side.norms.get(i) != NormType::RmsNorm {
                return invalid(format!(
                    "{name}_norm_types[{i}] is {:?}; only rms_norm (Sana's DC-AE) is supported",
                    side.norms.get(i)
                ));
            }
            if stage.layers == 0 && i > 0 {
                return invalid(format!(
                    "{name}_layers_per_block[{i}] is 0; only the first stage may be empty"
                ));
            }
            let attends = stage.block == BlockType::EfficientViTBlock;
            if attends && !stage.channels.is_multiple_of(self.attention_head_dim) {
                return invalid(format!(
                    "{name} stage {i}: {} channels are no multiple of attention_head_dim {}",
                    stage.channels, self.attention_head_dim
                ));
            }
            if stage.scales.iter().any(|kernel| kernel % 2 == 0) {
                return invalid(format!(
                    "{name}_qkv_multiscales[{i}]: kernel sizes must be odd"
                ));
            }
            Ok(stage)
        });
        let stages = stages.collect::<Result<Vec<_>, _>>()?;
        for (i, pair) in stages.windows(2).enumerate() {
            let (fine, coarse) = (pair[0].channels, pair[1].channels);
            if fine == 0 || !(fine * 4).is_multiple_of(coarse) {
                return invalid(format!(
                    "{name} stages {i} and {}: the shortcut between {fine} and {coarse} channels \
                     needs 4 x {fine} to be a multiple of {coarse}",
                    i + 1
                ));
            }
        }
        let last = stages[count - 1].channels;
        if !last.is_multiple_of(self.latent_channels) {
            return invalid(format!(
                "{name}: the last stage's {last} channels are no multiple of latent_channels {}",
                self.latent_channels
            ));
        }
        Ok(stages)
    }
}

/// One side's columns of the configuration.
struct Side<'a> {
    name: &'static str,
    channels: &'a [usize],
    layers: &'a [usize],
    blocks: &'a PerStage<BlockType>,
    scales: &'a [Vec<usize>],
    norms: &'a PerStage<NormType>,
    activations: &'a PerStage<ActFn>,
}

/// One stage of an encoder or decoder.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    pub(super) channels: usize,
    pub(super) layers: usize,
    pub(super) block: BlockType,
    pub(super) scales: Vec<usize>,
    pub(super) activation: Activation,
}

fn invalid<T>(reason: String) -> Result<T, WeightError> {
    Err(WeightError::Config {
        origin: "DC-AE config".into(),
        reason,
    })
}

/// A setting given once for all stages, or for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerStage<T> {
    /// The same for every stage.
    All(T),
    /// One per stage.
    Each(Vec<T>),
}

impl<T: Copy> PerStage<T> {
    /// Stage `i`'s.
    fn get(&self, i: usize) -> T {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values[i],
        }
    }

    /// How many stages are listed, if they are.
    fn len(&self) -> Option<usize> {
        match self {
            Self::All(_) => None,
            Self::Each(values) => Some(values.len()),
        }
    }
}

/// The kind of a stage's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockType {
    /// Two 3x3 convolutions.
    ResBlock,
    /// Multi-scale linear attention and a gated depthwise convolution.
    EfficientViTBlock,
}

/// How the decoder doubles its resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upsample {
    /// A convolution to four times the channels, then pixel shuffle.
    PixelShuffle,
    /// Nearest-neighbour upsampling, then a convolution.
    Interpolate,
}

/// How the encoder halves its resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Downsample {
    /// A convolution to a quarter of the channels, then pixel unshuffle.
    #[serde(rename = "pixel_unshuffle")]
    PixelUnshuffle,
    /// A convolution of stride 2.
    #[serde(alias = "conv")]
    Conv,
}

/// A norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormType {
    /// RMS norm over the channels.
    RmsNorm,
    /// Batch norm (MIT's f32c32-in models; not supported).
    BatchNorm,
    /// Layer norm (not supported).
    LayerNorm,
}

/// An activation's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActFn {
    /// SiLU.
    #[serde(alias = "swish")]
    Silu,
    /// ReLU.
    Relu,
}

impl ActFn {
    pub(super) fn forward(self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Silu => silu(x),
            Self::Relu => activation::relu(x),
        }
    }

    /// To be fused with the convolution before it.
    pub(super) fn activation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::Relu => Activation::Relu,
        }
    }
}
