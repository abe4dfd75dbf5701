//! DC-AE: the deep-compression autoencoder between images and latents (diffusers' `AutoencoderDC`).
//!
//! ```text
//! image [b, 3, H, W] -> Encoder -> latent [b, C, H / f, W / f] -> Decoder -> image
//! ```
//!
//! The encoder's stages go from fine to coarse, each ending in a downsampling block; the decoder's
//! go back, each beginning with an upsampling one. Fine stages are made of 3x3 convolutions, coarse
//! ones of linear attention. Public functions take and give `[b, c, h, w]`, PyTorch's order; inside,
//! images are channel-last. Generating needs the [`Decoder`] alone.

mod blocks;
mod config;
mod cost;
mod packed;

use std::sync::Arc;

use burn::tensor::Tensor;
use nitro_ops::{Stages, run_stages};

pub use config::{ActFn, BlockType, DcaeConfig, Downsample, NormType, PerStage, Upsample};

use crate::layers::{Conv2d, ConvSpec, RmsNorm};
use crate::{InputError, Params, WeightError};
use blocks::{Block, DownBlock, NORM_EPS, UpBlock, average_channels, repeat_channels};

/// Receives intermediate images, channel-last `[b, h, w, c]`, under their official module names.
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<4>);

/// Encoder and decoder.
#[derive(Clone, Debug)]
pub struct Dcae {
    /// Image to latent.
    pub encoder: Encoder,
    /// Latent to image.
    pub decoder: Decoder,
}

impl Dcae {
    /// Both halves, from `encoder.*` and `decoder.*`.
    pub fn new(config: &DcaeConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        Ok(Self {
            encoder: Encoder::new(config, p)?,
            decoder: Decoder::new(config, p)?,
        })
    }

    /// See [`Encoder::encode`].
    pub fn encode(&self, image: Tensor<4>) -> Result<Tensor<4>, InputError> {
        self.encoder.encode(image)
    }

    /// See [`Decoder::decode`].
    pub fn decode(&self, latent: Tensor<4>) -> Result<Tensor<4>, InputError> {
        self.decoder.decode(latent)
    }
}

/// Image to latent.
#[derive(Clone, Debug)]
pub struct Encoder {
    conv_in: EncoderIn,
    down_blocks: Vec<Vec<Block>>,
    conv_out: Conv2d,
    /// Channels averaged into one by the last convolution's shortcut, if it has one.
    out_shortcut: Option<usize>,
    image_channels: usize,
    spatial_factor: usize,
}

/// How the encoder begins.
#[derive(Clone, Debug)]
enum EncoderIn {
    Conv(Conv2d),
    /// Where the first stage is empty, its downsampling is all that is left of it.
    Down(DownBlock),
    /// In a model for inference, with the finest stages; `down_blocks` are then empty for these.
    Fine(Arc<Stages>),
}

impl Encoder {
    /// The encoder under `encoder.*` of an autoencoder's weights.
    pub fn new(config: &DcaeConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        let p = &p.sensitive().sub("encoder");
        let stages = config.encoder_stages()?;
        let fine = if p.packs() {
            packed::encoder_stages(config, &stages)
        } else {
            0
        };
        let down = config.downsample_block_type;
        let image = config.in_channels;

        let conv_in = p.sub("conv_in");
        let conv_in = if fine > 0 {
            EncoderIn::Fine(Arc::new(packed::encoder(p, &stages, fine, image)?))
        } else if stages[0].layers > 0 {
            EncoderIn::Conv(Conv2d::new(
                &conv_in,
                ConvSpec::new(image, stages[0].channels, 3),
            )?)
        } else {
            EncoderIn::Down(DownBlock::new(
                &conv_in,
                image,
                stages[1].channels,
                down,
                false,
            )?)
        };

        let mut down_blocks = Vec::with_capacity(stages.len());
        for (i, stage) in stages.iter().enumerate() {
            if i < fine {
                down_blocks.push(Vec::new());
                continue;
            }
            let p = p.sub("down_blocks").sub(i);
            let mut blocks = (0..stage.layers)
                .map(|j| Block::new(&p.sub(j), stage, config.attention_head_dim))
                .collect::<Result<Vec<_>, _>>()?;
            if let Some(next) = stages.get(i + 1).filter(|_| stage.layers > 0) {
                let p = p.sub(stage.layers);
                let block = DownBlock::new(&p, stage.channels, next.channels, down, true)?;
                blocks.push(Block::Down(block));
            }
            down_blocks.push(blocks);
        }

        let last = stages[stages.len() - 1].channels;
        let latent = config.latent_channels;
        Ok(Self {
            conv_in,
            down_blocks,
            conv_out: Conv2d::new(&p.sub("conv_out"), ConvSpec::new(last, latent, 3))?,
            out_shortcut: config.encoder_out_shortcut.then_some(last / latent),
            image_channels: image,
            spatial_factor: config.spatial_factor(),
        })
    }

    /// `image [b, 3, H, W]`, values -1 to 1, to the latent `[b, C, H / f, W / f]`, not scaled by
    /// the scaling factor. `H` and `W` are multiples of [`DcaeConfig::spatial_factor`] `f`.
    pub fn encode(&self, image: Tensor<4>) -> Result<Tensor<4>, InputError> {
        self.encode_observed(image, &mut |_, _| {})
    }

    /// [`Encoder::encode`], showing the outputs of `conv_in` and each `down_blocks.i`. A model for
    /// inference computes the fine ones together, and does not show these.
    pub fn encode_observed(
        &self,
        image: Tensor<4>,
        observe: Observer<'_>,
    ) -> Result<Tensor<4>, InputError> {
        let [_, channels, height, width] = image.dims();
        let factor = self.spatial_factor;
        if channels != self.image_channels || height % factor != 0 || width % factor != 0 {
            return Err(InputError {
                model: "DC-AE encoder",
                reason: format!(
                    "the image has {channels} channels and {height} x {width} pixels; it needs {} \
                     channels, and sides that are multiples of {factor}",
                    self.image_channels
                ),
            });
        }
        let x = image.permute([0, 2, 3, 1]); // [b, H, W, 3]
        let mut x = match &self.conv_in {
            EncoderIn::Conv(conv) => conv.forward(x),
            EncoderIn::Down(block) => block.forward(x),
            EncoderIn::Fine(stages) => run_stages(x, stages, None),
        };
        let fine = matches!(self.conv_in, EncoderIn::Fine(_));
        if !fine {
            observe("conv_in", x.clone());
        }
        for (i, stage) in self.down_blocks.iter().enumerate() {
            x = stage.iter().fold(x, |x, block| block.forward(x)); // [b, H / 2^(i+1), .., c_(i+1)]
            if !(fine && stage.is_empty()) {
                observe(&format!("down_blocks.{i}"), x.clone());
            }
        }
        let latent = self.conv_out.forward(x.clone()); // [b, H / f, W / f, C]
        let latent = match self.out_shortcut {
            Some(group) => latent + average_channels(x, group),
            None => latent,
        };
        Ok(latent.permute([0, 3, 1, 2]))
    }
}

/// Latent to image.
#[derive(Clone, Debug)]
pub struct Decoder {
    conv_in: Conv2d,
    /// Copies of each latent channel made by the first convolution's shortcut, if it has one.
    in_shortcut: Option<usize>,
    /// At full resolution first, as in the official names; they run from last to first.
    up_blocks: Vec<Vec<Block>>,
    out: DecoderOut,
    latent_channels: usize,
    /// See [`Decoder::set_tile`].
    tile: Option<usize>,
}

/// How the decoder ends.
#[derive(Clone, Debug)]
enum DecoderOut {
    Conv(RmsNorm, ActFn, Conv2d),
    /// Where the first stage is empty, its upsampling is all that is left of it.
    Up(RmsNorm, ActFn, UpBlock),
    /// In a model for inference, with the finest stages; `up_blocks` are then empty for these.
    Fine(Arc<Stages>),
}

impl Decoder {
    /// The decoder under `decoder.*` of an autoencoder's weights.
    pub fn new(config: &DcaeConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        let p = &p.sensitive().sub("decoder");
        let stages = config.decoder_stages()?;
        let fine = if p.packs() {
            packed::decoder_stages(config, &stages)
        } else {
            0
        };
        let up = config.upsample_block_type;
        let last = stages[stages.len() - 1].channels;
        let latent = config.latent_channels;

        let mut up_blocks = Vec::with_capacity(stages.len());
        for (i, stage) in stages.iter().enumerate() {
            if i < fine {
                up_blocks.push(Vec::new());
                continue;
            }
            let p = p.sub("up_blocks").sub(i);
            let mut blocks = Vec::with_capacity(stage.layers + 1);
            if let Some(coarser) = stages.get(i + 1).filter(|_| stage.layers > 0) {
                let block = UpBlock::new(&p.sub(0), coarser.channels, stage.channels, up, true)?;
                blocks.push(Block::Up(block));
            }
            for _ in 0..stage.layers {
                let p = p.sub(blocks.len());
                blocks.push(Block::new(&p, stage, config.attention_head_dim)?);
            }
            up_blocks.push(blocks);
        }

        let (conv_out, image) = (p.sub("conv_out"), config.in_channels);
        let norm_out = |width: usize| RmsNorm::with_bias(&p.sub("norm_out"), width, NORM_EPS);
        let activation = config.decoder_conv_act_fn;
        let out = if fine > 0 {
            let stages = packed::decoder(p, &stages, fine, activation, image)?;
            DecoderOut::Fine(Arc::new(stages))
        } else if stages[0].layers > 0 {
            let width = stages[0].channels;
            let conv = Conv2d::new(&conv_out, ConvSpec::new(width, image, 3))?;
            DecoderOut::Conv(norm_out(width)?, activation, conv)
        } else {
            let width = stages[1].channels;
            let block = UpBlock::new(&conv_out, width, image, up, false)?;
            DecoderOut::Up(norm_out(width)?, activation, block)
        };
        Ok(Self {
            conv_in: Conv2d::new(&p.sub("conv_in"), ConvSpec::new(latent, last, 3))?,
            in_shortcut: config.decoder_in_shortcut.then_some(last / latent),
            up_blocks,
            out,
            latent_channels: latent,
            tile: None,
        })
    }

    /// How many rows the fine stages of a model for inference keep in memory at a time; by default as
    /// many as run fastest. The image is the same to the last bit.
    pub fn set_tile(&mut self, rows: Option<usize>) {
        self.tile = rows;
    }

    /// `latent [b, C, h, w]`, already divided by the scaling factor, to the image
    /// `[b, 3, h f, w f]`, values about -1 to 1.
    pub fn decode(&self, latent: Tensor<4>) -> Result<Tensor<4>, InputError> {
        self.decode_observed(latent, &mut |_, _| {})
    }

    /// [`Decoder::decode`], showing the outputs of `conv_in` (without its shortcut), each
    /// `up_blocks.i` and `conv_out`. A model for inference computes the fine blocks together with
    /// `conv_out`, and shows the latter alone.
    pub fn decode_observed(
        &self,
        latent: Tensor<4>,
        observe: Observer<'_>,
    ) -> Result<Tensor<4>, InputError> {
        let [_, channels, ..] = latent.dims();
        if channels != self.latent_channels {
            return Err(InputError {
                model: "DC-AE decoder",
                reason: format!(
                    "the latent has {channels} channels; {} are expected",
                    self.latent_channels
                ),
            });
        }
        let z = latent.permute([0, 2, 3, 1]); // [b, h, w, C]
        let mut x = self.conv_in.forward(z.clone()); // [b, h, w, c_last]
        observe("conv_in", x.clone());
        if let Some(copies) = self.in_shortcut {
            x = x + repeat_channels(z, copies);
        }
        let fine = matches!(self.out, DecoderOut::Fine(_));
        for (i, stage) in self.up_blocks.iter().enumerate().rev() {
            x = stage.iter().fold(x, |x, block| block.forward(x)); // [b, h f / 2^i, .., c_i]
            if !(fine && stage.is_empty()) {
                observe(&format!("up_blocks.{i}"), x.clone());
            }
        }
        let image = match &self.out {
            DecoderOut::Conv(norm, activation, conv) => {
                conv.forward(activation.forward(norm.forward(x)))
            }
            DecoderOut::Up(norm, activation, block) => {
                block.forward(activation.forward(norm.forward(x)))
            }
            DecoderOut::Fine(stages) => run_stages(x, stages, self.tile),
        }; // [b, h f, w f, 3]
        observe("conv_out", image.clone());
        Ok(image.permute([0, 3, 1, 2]))
    }
}
