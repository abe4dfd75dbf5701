//! E-MMDiT, the velocity model of Nitro-E.
//!
//! Image and text tokens pass through joint blocks in three groups. The middle group, most of the
//! depth, sees the image through a few compressed tokens. `D` is the width, `T` the number of image
//! tokens, `L` that of text tokens. Official code: AMD-AGI/Nitro-E,
//! `core/models/transformer_emmdit.py`.

mod block;
mod compression;
mod config;
mod position;
mod stages;

use burn::tensor::{Tensor, TensorData};
use nitro_kernels::pool::install;
use nitro_ops::{Activation, Precision, layer_norm_modulate, pixel_unshuffle, silu};

pub use self::config::{Adaln, EmmditConfig, RepaConfig};
pub use self::position::PositionTable;
pub use self::stages::EmmditState;

use self::block::{Block, EPS};
use self::compression::{Compressor, Reconstructor};
use self::position::{TIME_CHANNELS, time_table};
use crate::layers::Linear;
use crate::{InputError, Params, WeightError};

/// Receives intermediate results by name, such as `block.04.hidden`.
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<3>);

/// What training reads from a forward pass.
#[derive(Clone, Debug)]
pub struct EmmditOutput {
    /// The velocity as tokens, `[B, T, patch * patch * out_channels]`.
    pub tokens: Tensor<3>,
    /// Each REPA projector's view of the first group's image tokens, `[B, T, z_dim]`.
    pub projections: Vec<Tensor<3>>,
}

/// The velocity model.
#[derive(Clone, Debug)]
pub struct Emmdit {
    config: EmmditConfig,
    patch_embed: Linear,
    positions: Tensor<3>,  // [max, max, D], as the checkpoint has it
    reinforced: Tensor<3>, // [1, T, D], always recomputed
    time: TimeEmbedding,
    text_embed: Linear,
    groups: [Vec<Block>; 3],
    compression: Option<(Compressor, Reconstructor)>,
    proj_out: Linear,
    projectors: Vec<[Linear; 3]>,
}

impl Emmdit {
    /// The model of `config` with parameters from `p`, under the official names.
    pub fn new(config: &EmmditConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let width = config.width();
        let patch = config.patch_size;
        let side = config.pos_embed_max_size;
        let table = config.positions();
        let positions: Tensor<3> =
            p.sub("pos_embed")
                .buffer("pos_embed", [1, side * side, width], || table.whole())?;
        let grid = config.grid();
        // What is outside the blocks costs little and is seen by all of them.
        let outer = p.sensitive();
        let reinforced = TensorData::new(table.centre(grid, grid), [1, grid * grid, width]);

        let mut index = 0;
        let mut group = |group: usize| -> Result<Vec<Block>, WeightError> {
            (0..config.block_groups[group])
                .map(|i| {
                    let last = index + 1 == config.blocks();
                    let place = p.sub(format_args!("block_groups.{group}.{i}"));
                    let block = Block::new(config, &place, index, last);
                    index += 1;
                    block
                })
                .collect()
        };
        let groups = [group(0)?, group(1)?, group(2)?];

        let compression = |width| -> Result<_, WeightError> {
            let compressor = Compressor::new(&outer.sub("tokencompressor.0.0"), width)?;
            Ok((
                compressor,
                Reconstructor::new(&outer.sub("tokenreconstructor.0.0"), width)?,
            ))
        };
        let projector = |(i, z): (usize, &usize), hidden: usize| -> Result<_, WeightError> {
            let p = p.sub(format_args!("projectors.{i}"));
            Ok([
                Linear::new(&p.sub(0), width, hidden)?,
                Linear::new(&p.sub(2), hidden, hidden)?,
                Linear::new(&p.sub(4), hidden, *z)?,
            ])
        };
        let projectors = match &config.repa {
            Some(RepaConfig {
                projector_dim,
                z_dims,
            }) => z_dims
                .iter()
                .enumerate()
                .map(|z| projector(z, *projector_dim))
                .collect::<Result<_, _>>()?,
            None => Vec::new(),
        };

        Ok(Self {
            patch_embed: Linear::patches(
                &outer.sub("pos_embed.proj"),
                config.in_channels,
                width,
                patch,
            )?,
            positions: positions.reshape([side, side, width]),
            reinforced: Tensor::from_data(reinforced, p.device()),
            time: TimeEmbedding::new(&p.sub("adaln_single"), width)?,
            text_embed: Linear::new(
                &outer.sub("context_embedder"),
                config.caption_channels,
                width,
            )?,
            groups,
            compression: config
                .token_compression
                .then(|| compression(width))
                .transpose()?,
            proj_out: Linear::new(
                &outer.sub("proj_out"),
                width,
                patch * patch * config.out_channels,
            )?,
            projectors,
            config: config.clone(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &EmmditConfig {
        &self.config
    }

    /// The velocity at `latents [B, C, H, W]`, given text features `[B, L, caption_channels]` and
    /// the diffusion time (0 to 1000) of each sample; same shape as the latents.
    pub fn forward(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
    ) -> Result<Tensor<4>, InputError> {
        // On a thread of the pool, the kernels need no hand-over each.
        install(|| self.forward_observed(latents, text, times, None))
    }

    /// [`forward`](Self::forward), showing intermediate results to `observer`.
    pub fn forward_observed(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
        observer: Option<Observer<'_>>,
    ) -> Result<Tensor<4>, InputError> {
        let [batch, _, height, width] = latents.dims();
        let (out, patch) = (self.config.out_channels, self.config.patch_size);
        let tokens = self.tokens(latents, text, times, false, observer)?.tokens;
        // [B, h, w, p, q, C] -> [B, C, h, p, w, q]
        Ok(tokens
            .reshape([batch, height / patch, width / patch, patch, patch, out])
            .permute([0, 5, 1, 3, 2, 4])
            .reshape([batch, out, height, width]))
    }

    /// What training needs: the velocity as tokens, and the REPA projections.
    pub fn forward_train(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
    ) -> Result<EmmditOutput, InputError> {
        self.tokens(latents, text, times, true, None)
    }

    fn tokens(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
        project: bool,
        mut observer: Option<Observer<'_>>,
    ) -> Result<EmmditOutput, InputError> {
        self.check_inputs(&latents, &text, times)?;
        let mut see = |name: &dyn Fn() -> String, value: &Tensor<3>| {
            if let Some(observer) = observer.as_mut() {
                observer(&name(), value.clone());
            }
        };
        let grid = self.tokens_of(&latents);
        let mut state = self.begin_observed(latents, text, times, grid, &mut see);
        let mut projections = Vec::new();
        for index in 0..self.config.blocks() {
            if project && index == self.config.block_groups[0] {
                projections = self.project(&state.image);
            }
            state = self.advance_observed(index, state, grid, &mut see);
        }
        let image = state.image;
        let image = layer_norm_modulate(image, None, None, EPS);
        see(&|| "norm_out".to_owned(), &image);
        Ok(EmmditOutput {
            tokens: self.proj_out.forward(image),
            projections,
        })
    }

    /// Rows and columns of tokens of `latents`.
    fn tokens_of(&self, latents: &Tensor<4>) -> [usize; 2] {
        let [_, _, height, width] = latents.dims();
        [height, width].map(|side| side / self.config.patch_size)
    }

    fn check_inputs(
        &self,
        latents: &Tensor<4>,
        text: &Tensor<3>,
        times: &[f32],
    ) -> Result<(), InputError> {
        let [batch, channels, height, width] = latents.dims();
        let [text_batch, length, features] = text.dims();
        let bad = |reason: String| InputError {
            model: "E-MMDiT",
            reason,
        };
        if channels != self.config.in_channels {
            let expected = self.config.in_channels;
            return Err(bad(format!(
                "latents of {channels} channels: expected {expected}"
            )));
        }
        if features != self.config.caption_channels {
            let expected = self.config.caption_channels;
            return Err(bad(format!(
                "text features of width {features}: expected {expected}"
            )));
        }
        if text_batch != batch || times.len() != batch {
            return Err(bad(format!(
                "{batch} latents, {text_batch} texts and {} times: expected one of each per sample",
                times.len()
            )));
        }
        self.config.check_input(height, width, length).map_err(bad)
    }

    /// Patches to tokens, with their positions: `[B, C, H, W] -> [B, T, D]`.
    fn embed(&self, latents: Tensor<4>, [rows, columns]: [usize; 2]) -> Tensor<3> {
        let batch = latents.dims()[0];
        let d = self.config.width();
        let patches = pixel_unshuffle(latents.permute([0, 2, 3, 1]), self.config.patch_size);
        let table = self.config.positions();
        let (top, left) = (table.first(rows), table.first(columns));
        let positions = self
            .positions
            .clone()
            .slice([top..top + rows, left..left + columns, 0..d]);
        let tokens = self
            .patch_embed
            .forward(patches)
            .reshape([batch, rows * columns, d]);
        tokens + positions.reshape([1, rows * columns, d])
    }

    /// The positions added before the last group, `[1, T, D]`.
    fn reinforcement(&self, [rows, columns]: [usize; 2]) -> Tensor<3> {
        if [rows, columns] == [self.config.grid(); 2] {
            return self.reinforced.clone();
        }
        let table = self.config.positions().centre(rows, columns);
        let shape = [1, rows * columns, self.config.width()];
        Tensor::from_data(TensorData::new(table, shape), &self.reinforced.device())
    }
}

/// A REPA projector: three layers with SiLU between them.
fn project_by(layers: &[Linear; 3], x: &Tensor<3>) -> Tensor<3> {
    let x = layers[0].forward_with(x.clone(), Activation::Silu);
    let x = layers[1].forward_with(x, Activation::Silu);
    layers[2].forward(x)
}

/// Diffusion times to the modulation vector that all blocks share (AdaLN-single).
#[derive(Clone, Debug)]
struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    linear: Linear,
}

impl TimeEmbedding {
    fn new(p: &Params<'_>, width: usize) -> Result<Self, WeightError> {
        // One vector per sample costs nothing, and steers every block: keep it exact.
        let p = p.with_precision(Precision::F32);
        let embedder = p.sub("emb.timestep_embedder");
        Ok(Self {
            linear_1: Linear::new(&embedder.sub("linear_1"), TIME_CHANNELS, width)?,
            linear_2: Linear::new(&embedder.sub("linear_2"), width, width)?,
            linear: Linear::new(&p.sub("linear"), width, 6 * width)?,
        })
    }

    /// The embedded times `[B, 1, D]` and the modulation `[B, 6, D]`.
    fn forward(&self, times: &[f32]) -> (Tensor<3>, Tensor<3>) {
        let table = TensorData::new(time_table(times), [times.len(), 1, TIME_CHANNELS]);
        let table = Tensor::<3>::from_data(table, &self.linear.device());
        let hidden = self.linear_1.forward_with(table, Activation::Silu);
        let embedded = self.linear_2.forward(hidden);
        let modulation = self.linear.forward(silu(embedded.clone()));
        let width = embedded.dims()[2];
        (embedded, modulation.reshape([times.len(), 6, width]))
    }
}
