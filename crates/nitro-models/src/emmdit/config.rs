//! The shape of an E-MMDiT, from its variant or from a checkpoint.

use serde::{Deserialize, Serialize};

use super::position::{PositionTable, TIME_CHANNELS};
use crate::{WeightError, WeightFiles};

/// How the diffusion time modulates a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adaln {
    /// Each block adds a bias to the shared time vector and scales it (Nitro-E).
    #[default]
    Affine,
    /// Each block only adds a bias (AdaLN-single, PixArt).
    Single,
}

/// Projectors that align features with another encoder's while training (REPA).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepaConfig {
    /// Width of a projector's two hidden layers.
    pub projector_dim: usize,
    /// Width of each target encoder's features; one projector each.
    pub z_dims: Vec<usize>,
}

/// The shape of an E-MMDiT.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmmditConfig {
    /// Latent side that the positional table is scaled for.
    pub sample_size: usize,
    /// Latent pixels per token, in each direction.
    pub patch_size: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Channels of the predicted velocity.
    pub out_channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Hidden width of the feed-forward layers, in units of the model's width.
    pub ff_mult: usize,
    /// Width of the text features.
    pub caption_channels: usize,
    /// Side of the stored positional table.
    pub pos_embed_max_size: usize,
    /// Blocks before, between and after token compression and reconstruction.
    pub block_groups: [usize; 3],
    /// Alternating subregion attention.
    pub use_sub_attn: bool,
    /// Whether the middle group sees compressed tokens; without it, it sees the whole grid.
    pub token_compression: bool,
    /// Whether positions are added again before the last group.
    pub position_reinforcement: bool,
    /// How the diffusion time modulates a block.
    pub adaln: Adaln,
    /// Projectors for training.
    pub repa: Option<RepaConfig>,
}

impl Default for EmmditConfig {
    fn default() -> Self {
        Self::nitro_e_512()
    }
}

impl EmmditConfig {
    /// Nitro-E for 512 x 512 pixels.
    pub fn nitro_e_512() -> Self {
        Self {
            sample_size: 16,
            patch_size: 1,
            in_channels: 32,
            out_channels: 32,
            heads: 24,
            head_dim: 32,
            ff_mult: 3,
            caption_channels: 2048,
            pos_embed_max_size: 96,
            block_groups: [4, 16, 4],
            use_sub_attn: true,
            token_compression: true,
            position_reinforcement: true,
            adaln: Adaln::Affine,
            repa: None,
        }
    }

    /// Nitro-E for 1024 x 1024 pixels: a larger grid, and every token attends to all.
    pub fn nitro_e_1024() -> Self {
        Self {
            sample_size: 32,
            use_sub_attn: false,
            ..Self::nitro_e_512()
        }
    }

    /// The configuration of a checkpoint, whose tensors tell all widths and group sizes.
    ///
    /// What no tensor tells is taken from `variant`: `sample_size`, `use_sub_attn` and
    /// `position_reinforcement`. Projectors in the checkpoint are found as well.
    pub fn from_weights(
        weights: &WeightFiles,
        variant: &EmmditConfig,
    ) -> Result<Self, WeightError> {
        let origin = || weights.origin().to_owned();
        let bad = |reason: String| WeightError::Config {
            origin: origin(),
            reason,
        };
        let shape = |name: &str, rank: usize| {
            let found = weights.shape(name).ok_or_else(|| WeightError::Missing {
                origin: origin(),
                name: name.to_owned(),
                expected: Vec::new(),
            })?;
            match found.len() == rank {
                true => Ok(found),
                false => Err(bad(format!("`{name}` has shape {found:?}, not {rank}-D"))),
            }
        };
        let proj = shape("pos_embed.proj.weight", 4)?; // [width, in, patch, patch]
        let (width, in_channels, patch_size) = (proj[0], proj[1], proj[2]);
        let head_dim = shape("block_groups.0.0.attn.norm_q.weight", 1)?[0];
        let table = shape("pos_embed.pos_embed", 3)?[1]; // [1, max * max, width]
        let hidden = shape("block_groups.0.0.ff.net.0.proj.weight", 2)?[0];
        let out = shape("proj_out.weight", 2)?[0];
        let count = |prefix: &str, leaf: &str| {
            (0..)
                .take_while(|i| weights.shape(&format!("{prefix}.{i}.{leaf}")).is_some())
                .count()
        };
        let projectors = (0..count("projectors", "4.weight"))
            .map(|i| Ok(shape(&format!("projectors.{i}.4.weight"), 2)?.to_vec()))
            .collect::<Result<Vec<_>, WeightError>>()?;
        let repa = projectors.first().map(|first| RepaConfig {
            projector_dim: first[1],
            z_dims: projectors.iter().map(|shape| shape[0]).collect(),
        });
        // By any of a part's tensors: one that is missing is then missed by name, and does not make
        // the rest of its part unexpected.
        let any = |part: &str| weights.names().any(|name| name.contains(part));
        let blocks = |group: usize| {
            let prefix = format!("block_groups.{group}.");
            let index = |name: &str| name.strip_prefix(&prefix)?.split('.').next()?.parse().ok();
            let last: Option<usize> = weights.names().filter_map(index).max();
            // No more blocks than tensors: a stray number must not make a model of it.
            last.map_or(0, |last| last.saturating_add(1))
                .min(weights.names().count())
        };
        let affine = any(".scale_shift_scale");
        let config = Self {
            patch_size,
            in_channels,
            out_channels: out / (patch_size * patch_size).max(1),
            heads: width / head_dim.max(1),
            head_dim,
            ff_mult: hidden / width.max(1),
            caption_channels: shape("context_embedder.weight", 2)?[1],
            pos_embed_max_size: table.isqrt(),
            block_groups: [0, 1, 2].map(blocks),
            token_compression: any("tokencompressor."),
            adaln: if affine { Adaln::Affine } else { Adaln::Single },
            repa,
            ..variant.clone()
        };
        config.check().map_err(|error| bad(error.to_string()))?;
        Ok(config)
    }

    /// Whether a model of this shape can be built, and if not, why.
    pub fn check(&self) -> Result<(), WeightError> {
        let problem = |reason: String| {
            Err(WeightError::Config {
                origin: "E-MMDiT configuration".to_owned(),
                reason,
            })
        };
        let sizes = [
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("ff_mult", self.ff_mult),
            ("caption_channels", self.caption_channels),
            (
                "sample_size / patch_size",
                self.sample_size / self.patch_size.max(1),
            ),
            (
                "the number of blocks in the last group",
                self.block_groups[2],
            ),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return problem(format!("{name} is 0, but must be at least 1"));
        }
        let (width, unit) = (self.width(), if self.token_compression { 16 } else { 4 });
        if width % unit != 0 {
            return problem(format!(
                "the width {width} (heads x head_dim) is no multiple of {unit}"
            ));
        }
        if self.grid() > self.pos_embed_max_size {
            return problem(format!(
                "a grid of {} tokens a side exceeds pos_embed_max_size {}",
                self.grid(),
                self.pos_embed_max_size
            ));
        }
        self.check_input(self.sample_size, self.sample_size, self.text_unit())
            .or_else(problem)
    }

    /// Whether latents of `height x width` and `text` tokens suit the model; the reason if not.
    pub fn check_input(&self, height: usize, width: usize, text: usize) -> Result<(), String> {
        let unit = self.patch_size * if self.token_compression { 4 } else { 1 };
        if height == 0 || width == 0 || !height.is_multiple_of(unit) || !width.is_multiple_of(unit)
        {
            return Err(format!(
                "latents of {height} x {width}: each side must be a multiple of {unit}"
            ));
        }
        let (rows, columns) = (height / self.patch_size, width / self.patch_size);
        if rows.max(columns) > self.pos_embed_max_size {
            return Err(format!(
                "latents of {height} x {width} exceed the positional table of {} x {} tokens",
                self.pos_embed_max_size, self.pos_embed_max_size
            ));
        }
        let unit = self.text_unit();
        if text == 0 || !text.is_multiple_of(unit) {
            return Err(format!(
                "{text} text tokens: must be a multiple of {unit}; pad the text"
            ));
        }
        for index in 0..self.blocks() {
            let (groups, run) = self.subregions(index);
            let tokens = self.image_tokens(index, rows, columns);
            if !tokens.is_multiple_of(groups * run) {
                return Err(format!(
                    "latents of {height} x {width} give block {index} {tokens} image tokens, which \
                     subregion attention cannot split into {groups} groups of runs of {run}"
                ));
            }
        }
        Ok(())
    }

    /// Channels of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Tokens along a side of the grid of `sample_size` latents.
    pub fn grid(&self) -> usize {
        self.sample_size / self.patch_size
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.block_groups.iter().sum()
    }

    /// Hidden width of the feed-forward layers.
    pub fn feed_forward_width(&self) -> usize {
        self.ff_mult * self.width()
    }

    /// The number of text tokens must be a multiple of this.
    pub fn text_unit(&self) -> usize {
        if self.use_sub_attn { 16 } else { 1 }
    }

    /// Subregion attention of the block at place `index` of all: the number of groups, and the
    /// length of the runs of tokens that stay together. The three forms take turns over all blocks.
    pub fn subregions(&self, index: usize) -> (usize, usize) {
        if self.use_sub_attn {
            [(1, 1), (4, 1), (4, 4)][index % 3]
        } else {
            (1, 1)
        }
    }

    /// The positional table.
    pub fn positions(&self) -> PositionTable {
        PositionTable {
            size: self.pos_embed_max_size,
            channels: self.width(),
            base: self.grid(),
            scale: (self.sample_size / 16).max(1),
        }
    }

    /// Image tokens that each block of the three groups sees, for `sample_size` latents.
    pub fn tokens_per_group(&self) -> [usize; 3] {
        let [first, middle, _] = self.block_groups;
        [0, first, first + middle].map(|index| self.image_tokens(index, self.grid(), self.grid()))
    }

    fn image_tokens(&self, index: usize, rows: usize, columns: usize) -> usize {
        let [first, middle, _] = self.block_groups;
        let tokens = rows * columns;
        let compressed = self.token_compression && (first..first + middle).contains(&index);
        if compressed {
            tokens / 4 + tokens / 16
        } else {
            tokens
        }
    }

    /// Trainable parameters of each part, in the order of the forward pass.
    pub fn parameter_counts(&self) -> Vec<(&'static str, usize)> {
        let d = self.width();
        let linear = |inputs: usize, outputs: usize| inputs * outputs + outputs;
        let patch = self.patch_size * self.patch_size;
        let modulation = if self.adaln == Adaln::Affine {
            12 * d
        } else {
            6 * d
        };
        let head = 2 * d + 3 * linear(d, d) + 2 * self.head_dim;
        let hidden = self.feed_forward_width();
        let tail = linear(d, d) + linear(d, hidden) + linear(hidden, d) + modulation;
        let body = |inputs: usize| linear(inputs, d) + linear(d, d);
        let group = |index: usize| {
            let last = if index == 2 { tail } else { 0 };
            self.block_groups[index] * 2 * (head + tail) - last
        };
        let mut parts = vec![
            ("patch embedding", linear(self.in_channels * patch, d)),
            (
                "time embedding",
                linear(TIME_CHANNELS, d) + linear(d, d) + linear(d, 6 * d),
            ),
            ("text embedding", linear(self.caption_channels, d)),
            ("blocks, first group", group(0)),
        ];
        if self.token_compression {
            parts.push(("token compressor", body(4 * d) + body(16 * d)));
        }
        parts.push(("blocks, middle group", group(1)));
        if self.token_compression {
            let merge = linear(3 * d, d) + linear(d, d);
            parts.push(("token reconstructor", body(d / 4) + body(d / 16) + merge));
        }
        parts.push(("blocks, last group", group(2)));
        parts.push(("output", linear(d, self.out_channels * patch)));
        if let Some(RepaConfig {
            projector_dim: p,
            z_dims,
        }) = &self.repa
        {
            let each = |z: &usize| linear(d, *p) + linear(*p, *p) + linear(*p, *z);
            parts.push(("REPA projectors", z_dims.iter().map(each).sum()));
        }
        parts
    }

    /// Floating-point operations (two per multiply-add) of one forward pass over one sample of
    /// `sample_size` latents and `text` tokens: all matrix products, in units of 10^9.
    pub fn gflop(&self, text: usize) -> f64 {
        let d = self.width();
        let grid = self.grid() * self.grid();
        let patch = self.patch_size * self.patch_size;
        let feed_forward = 2 * d * self.feed_forward_width();
        let mut products = grid * patch * d * (self.in_channels + self.out_channels)
            + text * self.caption_channels * d
            + TIME_CHANNELS * d
            + 7 * d * d;
        for index in 0..self.blocks() {
            let image = self.image_tokens(index, self.grid(), self.grid());
            let tokens = image + text;
            let finished = if index + 1 == self.blocks() {
                image
            } else {
                tokens
            };
            let (groups, _) = self.subregions(index);
            products += 3 * tokens * d * d
                + 2 * tokens * tokens / groups * d
                + finished * (d * d + feed_forward);
        }
        if self.token_compression {
            let (half, quarter) = (grid / 4, grid / 16);
            products += half * 5 * d * d + quarter * 17 * d * d; // compressor
            products += grid * (d / 4 + d / 16 + 2 * d) * d + grid * 4 * d * d; // reconstructor
        }
        2.0 * products as f64 / 1e9
    }
}
