//! DINOv2, the vision transformer whose patch features REPA aligns with.
//!
//! `D` is the width, `N` the number of patches, `R` that of register tokens. Tokens are the class
//! token, the registers, and the patches in row order. Official code: facebookresearch/dinov2,
//! `dinov2/models/vision_transformer.py`; Nitro-E resamples the position table with timm's
//! `resample_abs_pos_embed`.

mod positions;

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use nitro_ops::{AttentionShape, Qkv, attention, gate_residual, gelu, pixel_unshuffle};
use serde::{Deserialize, Serialize};

use self::positions::{Sampling, resample};
use crate::layers::{LayerNorm, Linear};
use crate::{Init, InputError, Params, WeightError, WeightFiles};

const EPS: f64 = 1e-6;

/// The shape of a DINOv2, under the official constructor's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dinov2Config {
    /// Picture side that the stored position table is for.
    pub img_size: usize,
    /// Pixels per token, in each direction.
    pub patch_size: usize,
    /// Channels of a token.
    pub embed_dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Hidden width of the feed-forward layers, in units of `embed_dim`.
    pub mlp_ratio: usize,
    /// LayerScale on both branches; a fresh model starts it at one, whatever number stands here.
    pub init_values: Option<f64>,
    /// Kind of the feed-forward layers; `mlp` is the one that all but the giant model have.
    pub ffn_layer: FeedForwardKind,
    /// Groups of blocks in the names of a distributed training checkpoint; 0 in released ones.
    pub block_chunks: usize,
    /// Register tokens.
    pub num_register_tokens: usize,
    /// Whether positions are filtered when a picture has fewer patches than the table.
    pub interpolate_antialias: bool,
    /// Added to the number of patches when the table's scale is computed; 0 for none.
    pub interpolate_offset: f64,
}

/// Kinds of feed-forward layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeedForwardKind {
    /// Two linear layers with GELU between them.
    #[default]
    Mlp,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self::vit_b14()
    }
}

impl Dinov2Config {
    /// `dinov2_vitb14`, Nitro-E's target: 518 pixels, 86M parameters.
    pub fn vit_b14() -> Self {
        Self {
            img_size: 518,
            patch_size: 14,
            embed_dim: 768,
            depth: 12,
            num_heads: 12,
            mlp_ratio: 4,
            init_values: Some(1.0),
            ffn_layer: FeedForwardKind::Mlp,
            block_chunks: 0,
            num_register_tokens: 0,
            interpolate_antialias: false,
            interpolate_offset: 0.1,
        }
    }

    /// The configuration of a released checkpoint: its tensors tell all widths, and a head has 64
    /// channels in all of them.
    pub fn from_weights(weights: &WeightFiles) -> Result<Self, WeightError> {
        let shape = |name: &str, rank: usize| match weights.shape(name) {
            Some(shape) if shape.len() == rank => Ok(shape),
            found => Err(WeightError::Config {
                origin: weights.origin().to_owned(),
                reason: format!("`{name}` is {found:?}, expected {rank} dimensions: not a DINOv2"),
            }),
        };
        let proj = shape("patch_embed.proj.weight", 4)?; // [D, 3, patch, patch]
        let (embed_dim, patch_size) = (proj[0], proj[2]);
        let positions = shape("pos_embed", 3)?[1]; // [1, 1 + N, D]
        let hidden = shape("blocks.0.mlp.fc1.weight", 2)?[0];
        let registers = weights.shape("register_tokens").map_or(0, |shape| shape[1]);
        let scaled = weights.shape("blocks.0.ls1.gamma").is_some();
        let config = Self {
            img_size: positions.saturating_sub(1).isqrt() * patch_size,
            patch_size,
            embed_dim,
            depth: (0..)
                .take_while(|i| weights.shape(&format!("blocks.{i}.norm1.weight")).is_some())
                .count(),
            num_heads: (embed_dim / 64).max(1),
            mlp_ratio: hidden / embed_dim.max(1),
            init_values: scaled.then_some(1.0),
            num_register_tokens: registers,
            // As `dinov2_vit*14_reg` are built.
            interpolate_antialias: registers > 0,
            interpolate_offset: if registers > 0 { 0.0 } else { 0.1 },
            ..Self::vit_b14()
        };
        config.check()?;
        Ok(config)
    }

    /// Shape and weights of what is at `path`: a released checkpoint, whose tensors tell its shape, or
    /// a folder with `config.json` and `model.safetensors`.
    pub fn open(path: &Path) -> Result<(Self, WeightFiles), WeightError> {
        if !path.is_dir() {
            let weights = WeightFiles::open(path)?;
            return Ok((Self::from_weights(&weights)?, weights));
        }
        let file = path.join("config.json");
        let text = std::fs::read(&file).map_err(|source| WeightError::Io {
            path: file.clone(),
            source,
        })?;
        let config = serde_json::from_slice(&text).map_err(|e| WeightError::Config {
            origin: file.display().to_string(),
            reason: format!("no DINOv2: {e}"),
        })?;
        Ok((config, WeightFiles::open(path.join("model.safetensors"))?))
    }

    /// Side of the position table's grid.
    pub fn grid(&self) -> usize {
        self.img_size / self.patch_size.max(1)
    }

    /// Floating-point operations (two per multiply-add) of one forward pass over a picture of `grid` x
    /// `grid` patches: all matrix products, in units of 10^9.
    pub fn gflop(&self, grid: usize) -> f64 {
        let (d, patches) = (self.embed_dim, grid * grid);
        let tokens = 1 + self.num_register_tokens + patches;
        let block = tokens * (4 + 2 * self.mlp_ratio) * d * d + 2 * tokens * tokens * d;
        let products = patches * 3 * self.patch_size * self.patch_size * d + self.depth * block;
        2.0 * products as f64 / 1e9
    }

    /// Whether a model of this shape can be built, and if not, why.
    pub fn check(&self) -> Result<(), WeightError> {
        let sizes = [
            self.patch_size,
            self.embed_dim,
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            self.grid(),
        ];
        let reason = if sizes.contains(&0) {
            "every size must be at least one, and a picture at least one patch".to_owned()
        } else if !self.img_size.is_multiple_of(self.patch_size) {
            let (side, patch) = (self.img_size, self.patch_size);
            format!("a picture of {side} pixels is no whole number of {patch}-pixel patches")
        } else if !self.embed_dim.is_multiple_of(self.num_heads) {
            let (width, heads) = (self.embed_dim, self.num_heads);
            format!("width {width} does not divide among {heads} heads")
        } else if self.block_chunks != 0 {
            "block_chunks must be 0: chunked names are those of training checkpoints".to_owned()
        } else {
            return Ok(());
        };
        Err(WeightError::Config {
            origin: "DINOv2 configuration".to_owned(),
            reason,
        })
    }
}

/// What `forward_features` gives, after the final norm except where named otherwise.
#[derive(Clone, Debug)]
pub struct Dinov2Features {
    /// `x_norm_clstoken`, `[B, D]`.
    pub class: Tensor<2>,
    /// `x_norm_regtokens`, `[B, R, D]`, when the model has registers.
    pub registers: Option<Tensor<3>>,
    /// `x_norm_patchtokens`, `[B, N, D]`: REPA's target.
    pub patches: Tensor<3>,
    /// `x_prenorm`, all tokens before the final norm, `[B, 1 + R + N, D]`.
    pub prenorm: Tensor<3>,
}

/// The encoder.
#[derive(Clone, Debug)]
pub struct Dinov2 {
    config: Dinov2Config,
    patch_embed: Linear,
    class: Tensor<3>,             // [1, 1, D]
    positions: Tensor<3>,         // [1, 1 + N, D]
    grid: [usize; 2],             // rows and columns of `positions`
    registers: Option<Tensor<3>>, // [1, R, D]
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Dinov2 {
    /// The model of `config` with parameters from `p`, under the official names.
    pub fn new(config: &Dinov2Config, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let d = config.embed_dim;
        let grid = config.grid();
        let small = Init::Normal(0.02);
        let count = config.num_register_tokens;
        // Part of the state dict, of use in self-supervised training alone.
        p.tensor::<2>("mask_token", [1, d], Init::Zeros)?;
        Ok(Self {
            patch_embed: Linear::patches(&p.sub("patch_embed.proj"), 3, d, config.patch_size)?,
            class: p.tensor("cls_token", [1, 1, d], Init::Normal(1e-6))?,
            positions: p.tensor("pos_embed", [1, 1 + grid * grid, d], small)?,
            grid: [grid; 2],
            registers: (count > 0)
                .then(|| p.tensor("register_tokens", [1, count, d], Init::Normal(1e-6)))
                .transpose()?,
            blocks: (0..config.depth)
                .map(|i| Block::new(config, &p.sub(format_args!("blocks.{i}"))))
                .collect::<Result<_, _>>()?,
            norm: LayerNorm::new(&p.sub("norm"), d, EPS)?,
            config: config.clone(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Dinov2Config {
        &self.config
    }

    /// The model with its position table resampled to `rows` x `columns` patches as by timm's
    /// `resample_abs_pos_embed` (filtered bicubic); Nitro-E does so once, for 16 x 16.
    pub fn resampled(self, [rows, columns]: [usize; 2]) -> Self {
        let [from_rows, from_columns] = self.grid;
        let sampling = Sampling {
            scale: [
                from_rows as f64 / rows as f64,
                from_columns as f64 / columns as f64,
            ],
            antialias: true,
        };
        let positions = self.resample_positions([rows, columns], sampling);
        Self {
            positions,
            grid: [rows, columns],
            ..self
        }
    }

    /// The position table, `[1, 1 + N, D]`, the class token's first.
    pub fn positions(&self) -> Tensor<3> {
        self.positions.clone()
    }

    /// The positions added to a picture of `height` x `width` pixels.
    ///
    /// A picture of another size than the table's is given interpolated ones, through which no
    /// gradient flows.
    pub fn positions_for(&self, height: usize, width: usize) -> Tensor<3> {
        let patch = self.config.patch_size;
        let [rows, columns] = [height / patch, width / patch];
        if height == width && rows * columns == self.grid[0] * self.grid[1] {
            return self.positions.clone();
        }
        // The official interpolation takes the table for a square one.
        let side = (self.grid[0] * self.grid[1]).isqrt() as f64;
        let offset = self.config.interpolate_offset;
        let sampling = Sampling {
            scale: [
                side / (rows as f64 + offset),
                side / (columns as f64 + offset),
            ],
            antialias: self.config.interpolate_antialias,
        };
        self.resample_positions([rows, columns], sampling)
    }

    fn resample_positions(&self, grid: [usize; 2], sampling: Sampling) -> Tensor<3> {
        let d = self.config.embed_dim;
        let count = self.grid[0] * self.grid[1];
        let class = self.positions.clone().slice_dim(1, 0..1);
        let patches = self.positions.clone().slice_dim(1, 1..1 + count);
        let table = patches.into_data().iter::<f32>().collect::<Vec<_>>();
        let table = resample(&table, self.grid, grid, d, sampling);
        let shape = [1, grid[0] * grid[1], d];
        let table = Tensor::from_data(TensorData::new(table, shape), &class.device());
        Tensor::cat(vec![class, table], 1)
    }

    /// Features of `pictures [B, 3, H, W]`, normalised with ImageNet's mean and deviation.
    pub fn forward_features(&self, pictures: Tensor<4>) -> Result<Dinov2Features, InputError> {
        self.forward_observed(pictures, &mut |_, _| {})
    }

    /// [`forward_features`](Self::forward_features), showing intermediate results to `observer`.
    pub fn forward_observed(
        &self,
        pictures: Tensor<4>,
        observer: &mut dyn FnMut(&str, Tensor<3>),
    ) -> Result<Dinov2Features, InputError> {
        let [batch, channels, height, width] = pictures.dims();
        let patch = self.config.patch_size;
        let whole = height.is_multiple_of(patch) && width.is_multiple_of(patch);
        if channels != 3 || !whole || height == 0 || width == 0 {
            return Err(InputError {
                model: "DINOv2",
                reason: format!(
                    "pictures are {channels} x {height} x {width}: expected 3 channels and sides \
                     that are multiples of {patch}"
                ),
            });
        }
        let d = self.config.embed_dim;
        let count = (height / patch) * (width / patch);
        let patches = pixel_unshuffle(pictures.permute([0, 2, 3, 1]), patch);
        let patches = self.patch_embed.forward(patches).reshape([batch, count, d]);
        observer("patch_embed", patches.clone());

        let class = self.class.clone().expand([batch, 1, d]);
        let mut x = Tensor::cat(vec![class, patches], 1) + self.positions_for(height, width);
        let extra = self.config.num_register_tokens;
        if let Some(registers) = &self.registers {
            // The registers stand between class token and patches and have no position.
            let parts = vec![
                x.clone().slice_dim(1, 0..1),
                registers.clone().expand([batch, extra, d]),
                x.slice_dim(1, 1..1 + count),
            ];
            x = Tensor::cat(parts, 1);
        }
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(x);
            observer(&format!("block.{i}"), x.clone());
        }
        let y = self.norm.forward(x.clone()); // [B, 1 + R + N, D]
        Ok(Dinov2Features {
            class: y.clone().slice_dim(1, 0..1).reshape([batch, d]),
            registers: (extra > 0).then(|| y.clone().slice_dim(1, 1..1 + extra)),
            patches: y.slice_dim(1, 1 + extra..1 + extra + count),
            prenorm: x,
        })
    }
}

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.
#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    scale1: Option<Tensor<1>>,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
    scale2: Option<Tensor<1>>,
    attention: AttentionShape,
}

impl Block {
    fn new(config: &Dinov2Config, p: &Params<'_>) -> Result<Self, WeightError> {
        let d = config.embed_dim;
        let hidden = config.mlp_ratio * d;
        let scale = |name: &str| {
            config
                .init_values
                .map(|_| p.sub(name).tensor("gamma", [d], Init::Ones))
                .transpose()
        };
        Ok(Self {
            norm1: LayerNorm::new(&p.sub("norm1"), d, EPS)?,
            qkv: Linear::new(&p.sub("attn.qkv"), d, 3 * d)?,
            proj: Linear::new(&p.sub("attn.proj"), d, d)?,
            scale1: scale("ls1")?,
            norm2: LayerNorm::new(&p.sub("norm2"), d, EPS)?,
            up: Linear::new(&p.sub("mlp.fc1"), d, hidden)?,
            down: Linear::new(&p.sub("mlp.fc2"), hidden, d)?,
            scale2: scale("ls2")?,
            attention: AttentionShape::full(config.num_heads),
        })
    }

    /// `x [B, T, D]`.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.norm1.forward(x.clone());
        let [q, k, v] = self.qkv.forward_split(&y);
        let qkv = Qkv { q, k, v };
        let y = self.proj.forward(attention(qkv, self.attention, None));
        let x = add_scaled(x, &self.scale1, y);
        let y = self.up.forward(self.norm2.forward(x.clone()));
        add_scaled(x, &self.scale2, self.down.forward(gelu(y)))
    }
}

/// `x + gamma * branch`, `gamma [D]` being LayerScale's.
fn add_scaled(x: Tensor<3>, gamma: &Option<Tensor<1>>, branch: Tensor<3>) -> Tensor<3> {
    let [batch, _, d] = x.dims();
    match gamma {
        Some(gamma) => gate_residual(x, gamma.clone().reshape([1, d]).expand([batch, d]), branch),
        None => x + branch,
    }
}
