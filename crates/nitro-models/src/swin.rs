//! Swin Transformer (arXiv 2103.14030) as a backbone, under Hugging Face's names (`SwinBackbone`):
//! attention within windows that every second block shifts by half a window. Images are channel-last,
//! `[b, h, w, c]`, throughout.

use burn::tensor::{Int, Tensor, TensorData};
use nitro_ops::{cross_attention, gelu, pixel_unshuffle};
use serde::{Deserialize, Serialize};

use crate::layers::{LayerNorm, Linear};
use crate::{Init, Params, WeightError};

/// What tokens of other regions of a shifted window are told apart by.
const OTHER_REGION: f32 = -100.0;

/// A Swin's sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwinConfig {
    /// Channels of the first stage; each next has twice as many.
    pub embed_dim: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Heads of each stage.
    pub num_heads: Vec<usize>,
    /// Pixels of the feature map on a window's side.
    pub window_size: usize,
    /// Pixels on a patch's side.
    #[serde(default = "patch_size")]
    pub patch_size: usize,
    /// Hidden channels of the feed-forward layers, per channel.
    #[serde(default = "mlp_ratio")]
    pub mlp_ratio: f64,
    /// Epsilon of the blocks' layer norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
}

fn patch_size() -> usize {
    4
}

fn mlp_ratio() -> f64 {
    4.0
}

fn eps() -> f64 {
    1e-5
}

impl SwinConfig {
    /// Swin-S.
    pub fn small() -> Self {
        Self {
            embed_dim: 96,
            depths: vec![2, 2, 18, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            patch_size: patch_size(),
            mlp_ratio: mlp_ratio(),
            layer_norm_eps: eps(),
        }
    }

    /// Channels of each stage.
    pub fn channels(&self) -> Vec<usize> {
        (0..self.depths.len())
            .map(|i| self.embed_dim << i)
            .collect()
    }

    fn check(&self) -> Result<(), WeightError> {
        let stages = self.depths.len();
        let heads_fit = self.num_heads.len() == stages
            && std::iter::zip(self.channels(), &self.num_heads)
                .all(|(c, &h)| h > 0 && c.is_multiple_of(h));
        match heads_fit && stages > 0 && self.window_size > 1 && self.patch_size > 0 {
            true => Ok(()),
            false => Err(WeightError::Config {
                origin: "Swin configuration".to_owned(),
                reason: format!(
                    "{stages} stages need as many num_heads, each a divisor of its stage's channels \
                     {:?}, and a window of at least 2; found {:?} and {}",
                    self.channels(),
                    self.num_heads,
                    self.window_size
                ),
            }),
        }
    }
}

/// The backbone: pictures to one feature map per stage.
#[derive(Clone, Debug)]
pub struct Swin {
    projection: Linear,
    norm: LayerNorm,
    stages: Vec<Stage>,
    patch: usize,
}

impl Swin {
    /// The backbone of `config`, every stage an output.
    pub fn new(config: &SwinConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let (width, patch) = (config.embed_dim, config.patch_size);
        let embeddings = p.sub("embeddings");
        let projection = embeddings.sub("patch_embeddings").sub("projection");
        Ok(Self {
            projection: Linear::patches(&projection, 3, width, patch)?,
            norm: LayerNorm::new(&embeddings.sub("norm"), width, eps())?,
            stages: (0..config.depths.len())
                .map(|i| Stage::new(p, config, i))
                .collect::<Result<_, _>>()?,
            patch,
        })
    }

    /// Normalised pixels `[b, h, w, 3]` of any size to the stages' normalised features
    /// `[b, h / 4 / 2^i, w / 4 / 2^i, embed_dim 2^i]`, sizes rounded up.
    pub fn forward(&self, pixels: Tensor<4>) -> Vec<Tensor<4>> {
        let patches = pixel_unshuffle(pad_to(pixels, self.patch), self.patch);
        let mut x = self.norm.forward(self.projection.forward(patches));
        let mut features = Vec::new();
        for stage in &self.stages {
            let (feature, next) = stage.forward(x);
            features.push(feature);
            x = next;
        }
        features
    }
}

/// Zeros to the right and below until `unit` divides both sides.
fn pad_to(x: Tensor<4>, unit: usize) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let (right, below) = (w.next_multiple_of(unit) - w, h.next_multiple_of(unit) - h);
    let device = x.device();
    let x = match right {
        0 => x,
        right => Tensor::cat(vec![x, Tensor::zeros([b, h, right, c], &device)], 2),
    };
    match below {
        0 => x,
        below => Tensor::cat(vec![x, Tensor::zeros([b, below, w + right, c], &device)], 1),
    }
}

/// Moves rows and columns up and left by `by`, those that fall off to the other end.
fn roll(x: Tensor<4>, by: usize) -> Tensor<4> {
    let [_, h, w, _] = x.dims();
    let x = Tensor::cat(
        vec![x.clone().slice_dim(1, by..h), x.slice_dim(1, 0..by)],
        1,
    );
    Tensor::cat(
        vec![x.clone().slice_dim(2, by..w), x.slice_dim(2, 0..by)],
        2,
    )
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<Block>,
    /// Layer norm of this stage as an output.
    output_norm: LayerNorm,
    downsample: Option<PatchMerging>,
    window: usize,
}

impl Stage {
    fn new(p: &Params<'_>, config: &SwinConfig, index: usize) -> Result<Self, WeightError> {
        let width = config.embed_dim << index;
        let layer = p.sub("encoder").sub("layers").sub(index);
        let norms = p.sub("hidden_states_norms");
        let last = index + 1 == config.depths.len();
        Ok(Self {
            blocks: (0..config.depths[index])
                .map(|i| Block::new(&layer.sub("blocks").sub(i), config, index, i % 2 == 1))
                .collect::<Result<_, _>>()?,
            output_norm: LayerNorm::new(&norms.sub(format!("stage{}", index + 1)), width, eps())?,
            downsample: (!last)
                .then(|| PatchMerging::new(&layer.sub("downsample"), width))
                .transpose()?,
            window: config.window_size,
        })
    }

    /// The stage's output, and the next stage's input.
    fn forward(&self, mut x: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [_, h, w, _] = x.dims();
        let grid = [h, w].map(|n| n.next_multiple_of(self.window));
        let mask = shift_mask(grid, self.window, &x);
        for block in &self.blocks {
            x = block.forward(x, &mask);
        }
        let feature = self.output_norm.forward(x.clone());
        match &self.downsample {
            Some(merge) => (feature, merge.forward(x)),
            None => (feature, x),
        }
    }
}

/// What keeps regions that the shift put into one window apart, `[windows, 1, n, n]` with `n` tokens
/// in a window.
fn shift_mask([h, w]: [usize; 2], window: usize, like: &Tensor<4>) -> Tensor<4> {
    let (shift, tokens) = (window / 2, window * window);
    // 0 inside, 1 between the last window's start and the shift, 2 for what was rolled around.
    let region = |i: usize, n: usize| usize::from(i + window >= n) + usize::from(i + shift >= n);
    let mut mask = Vec::with_capacity(h * w * tokens);
    for (top, left) in (0..h)
        .step_by(window)
        .flat_map(|top| (0..w).step_by(window).map(move |left| (top, left)))
    {
        let regions: Vec<usize> = (0..tokens)
            .map(|t| 3 * region(top + t / window, h) + region(left + t % window, w))
            .collect();
        for a in &regions {
            let row = regions
                .iter()
                .map(|b| if a == b { 0.0 } else { OTHER_REGION });
            mask.extend(row);
        }
    }
    let windows = h * w / tokens;
    let data = TensorData::new(mask, [windows, 1, tokens, tokens]);
    Tensor::from_data(data, &like.device())
}

/// `x + window attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Clone, Debug)]
struct Block {
    layernorm_before: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    /// Of each head for each pair of a window's tokens, `[1, heads, n, n]`.
    position_bias: Tensor<4>,
    layernorm_after: LayerNorm,
    intermediate: Linear,
    output: Linear,
    heads: usize,
    window: usize,
    shifted: bool,
}

impl Block {
    fn new(
        p: &Params<'_>,
        config: &SwinConfig,
        stage: usize,
        shifted: bool,
    ) -> Result<Self, WeightError> {
        let (width, heads) = (config.embed_dim << stage, config.num_heads[stage]);
        let hidden = (width as f64 * config.mlp_ratio) as usize;
        let (attention, window) = (p.sub("attention").sub("self"), config.window_size);
        let project = |name: &str| Linear::new(&attention.sub(name), width, width);
        let norm = |name: &str| LayerNorm::new(&p.sub(name), width, config.layer_norm_eps);
        let offsets = 2 * window - 1;
        let table = attention.tensor::<2>(
            "relative_position_bias_table",
            [offsets * offsets, heads],
            Init::Normal(0.02),
        )?;
        // Row (dy + window - 1) * offsets + dx + window - 1 of the table is for a query that stands
        // (dy, dx) after its key.
        let tokens = window * window;
        let rows: Vec<i32> = (0..tokens * tokens)
            .map(|i| {
                let (query, key) = (i / tokens, i % tokens);
                let dy = query / window + window - 1 - key / window;
                let dx = query % window + window - 1 - key % window;
                (dy * offsets + dx) as i32
            })
            .collect();
        let rows =
            Tensor::<1, Int>::from_data(TensorData::new(rows, [tokens * tokens]), p.device());
        Ok(Self {
            layernorm_before: norm("layernorm_before")?,
            query: project("query")?,
            key: project("key")?,
            value: project("value")?,
            dense: Linear::new(&p.sub("attention").sub("output").sub("dense"), width, width)?,
            position_bias: table
                .select(0, rows)
                .transpose()
                .reshape([1, heads, tokens, tokens]),
            layernorm_after: norm("layernorm_after")?,
            intermediate: Linear::new(&p.sub("intermediate").sub("dense"), width, hidden)?,
            output: Linear::new(&p.sub("output").sub("dense"), hidden, width)?,
            heads,
            window,
            shifted,
        })
    }

    fn forward(&self, x: Tensor<4>, mask: &Tensor<4>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let (window, shift) = (self.window, self.window / 2);
        let y = pad_to(self.layernorm_before.forward(x.clone()), window);
        let [_, rows, columns, _] = y.dims();
        let (down, across) = (rows / window, columns / window);
        let y = if self.shifted { roll(y, shift) } else { y };
        let windows = y
            .reshape([b, down, window, across, window, c])
            .swap_dims(2, 3)
            .reshape([b * down * across, window * window, c]);
        let bias = match self.shifted {
            true => (self.position_bias.clone() + mask.clone()).repeat_dim(0, b),
            false => self.position_bias.clone(),
        };
        let y = cross_attention(
            self.query.forward(windows.clone()),
            self.key.forward(windows.clone()),
            self.value.forward(windows),
            self.heads,
            Some(bias),
        );
        let y = self
            .dense
            .forward(y)
            .reshape([b, down, across, window, window, c])
            .swap_dims(2, 3)
            .reshape([b, rows, columns, c]);
        let y = match self.shifted {
            true => unroll(y, shift),
            false => y,
        };
        let x = x + y.slice([0..b, 0..h, 0..w]);
        let y = gelu(
            self.intermediate
                .forward(self.layernorm_after.forward(x.clone())),
        );
        x + self.output.forward(y)
    }
}

/// Undoes [`roll`].
fn unroll(x: Tensor<4>, by: usize) -> Tensor<4> {
    let [_, h, w, _] = x.dims();
    let x = Tensor::cat(
        vec![x.clone().slice_dim(1, h - by..h), x.slice_dim(1, 0..h - by)],
        1,
    );
    Tensor::cat(
        vec![x.clone().slice_dim(2, w - by..w), x.slice_dim(2, 0..w - by)],
        2,
    )
}

/// Halves the resolution: `[b, h, w, c] -> [b, h / 2, w / 2, 2 c]`, sides rounded up.
#[derive(Clone, Debug)]
struct PatchMerging {
    norm: LayerNorm,
    reduction: Linear,
}

impl PatchMerging {
    fn new(p: &Params<'_>, width: usize) -> Result<Self, WeightError> {
        Ok(Self {
            norm: LayerNorm::new(&p.sub("norm"), 4 * width, eps())?,
            reduction: Linear::without_bias(&p.sub("reduction"), 4 * width, 2 * width)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = pad_to(x, 2);
        let [b, h, w, c] = x.dims();
        // The four pixels of a block one after the other, column by column.
        let x = x
            .reshape([b, h / 2, 2, w / 2, 2, c])
            .permute([0, 1, 3, 4, 2, 5])
            .reshape([b, h / 2, w / 2, 4 * c]);
        self.reduction.forward(self.norm.forward(x))
    }
}
