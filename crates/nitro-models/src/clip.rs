//! CLIP (arXiv 2103.00020) under open_clip's names: pictures and texts to one space of features.
//!
//! Both towers are the same pre-norm transformer. The vision tower reads patches and answers with its
//! class token; the text tower is causal and answers with the position of the end-of-text token.
//! HPSv2.1 is the ViT-H/14 shape with exact GELU, GenEval's colour classifier ViT-L/14 with
//! OpenAI's quick one.

use burn::tensor::module::embedding;
use burn::tensor::{Int, Tensor};
use nitro_ops::{AttentionShape, Qkv, attention, gelu, pixel_unshuffle, quick_gelu};
use serde::{Deserialize, Serialize};

use crate::layers::{LayerNorm, Linear};
use crate::{Init, InputError, Params, WeightError};

/// Every layer norm of CLIP.
const EPS: f64 = 1e-5;

/// Receives intermediate results: `visual.ln_pre`, `visual.block.i`, `text.block.i`, `text.ln_final`.
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<3>);

/// A CLIP's sizes, as open_clip's `model_cfg` writes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClipConfig {
    /// Width of the features of both towers.
    pub embed_dim: usize,
    /// The picture's tower.
    pub vision_cfg: VisionConfig,
    /// The text's tower.
    pub text_cfg: TextConfig,
    /// Whether GELU is OpenAI's `x sigmoid(1.702 x)`.
    #[serde(default)]
    pub quick_gelu: bool,
}

/// The picture's tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Pixels on a side.
    pub image_size: usize,
    /// Blocks.
    pub layers: usize,
    /// Channels.
    pub width: usize,
    /// Channels of a head.
    #[serde(default = "head_width")]
    pub head_width: usize,
    /// Pixels on a patch's side.
    pub patch_size: usize,
    /// Hidden channels of the feed-forward layers, per channel.
    #[serde(default = "mlp_ratio")]
    pub mlp_ratio: f64,
}

/// The text's tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextConfig {
    /// Tokens of a text, padding included.
    pub context_length: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// Channels.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
}

fn head_width() -> usize {
    64
}

fn mlp_ratio() -> f64 {
    4.0
}

impl ClipConfig {
    /// open_clip's `ViT-H-14`: HPSv2 and HPSv2.1.
    pub fn vit_h_14() -> Self {
        Self {
            embed_dim: 1024,
            vision_cfg: VisionConfig {
                image_size: 224,
                layers: 32,
                width: 1280,
                head_width: 80,
                patch_size: 14,
                mlp_ratio: 4.0,
            },
            text_cfg: TextConfig {
                context_length: 77,
                vocab_size: 49408,
                width: 1024,
                heads: 16,
                layers: 24,
            },
            quick_gelu: false,
        }
    }

    /// open_clip's `ViT-L-14` with the weights "openai".
    pub fn vit_l_14_openai() -> Self {
        Self {
            embed_dim: 768,
            vision_cfg: VisionConfig {
                image_size: 224,
                layers: 24,
                width: 1024,
                head_width: 64,
                patch_size: 14,
                mlp_ratio: 4.0,
            },
            text_cfg: TextConfig {
                context_length: 77,
                vocab_size: 49408,
                width: 768,
                heads: 12,
                layers: 12,
            },
            quick_gelu: true,
        }
    }

    fn check(&self) -> Result<(), WeightError> {
        let (vision, text) = (&self.vision_cfg, &self.text_cfg);
        let divides =
            |part: usize, whole: usize| part > 0 && whole > 0 && whole.is_multiple_of(part);
        let problem = if !divides(vision.patch_size, vision.image_size) {
            "patch_size does not divide image_size"
        } else if !divides(vision.head_width, vision.width) {
            "head_width does not divide the vision tower's width"
        } else if !divides(text.heads, text.width) {
            "heads does not divide the text tower's width"
        } else {
            return Ok(());
        };
        Err(WeightError::Config {
            origin: "CLIP configuration".to_owned(),
            reason: problem.to_owned(),
        })
    }
}

/// Both towers.
#[derive(Clone, Debug)]
pub struct Clip {
    visual: VisionTower,
    text: TextTower,
    logit_scale: Tensor<1>, // its logarithm
}

impl Clip {
    /// The model of `config`.
    pub fn new(config: &ClipConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        Ok(Self {
            visual: VisionTower::new(&p.sub("visual"), config)?,
            text: TextTower::new(p, config)?,
            logit_scale: p.scalar("logit_scale", Init::Constant((1.0f64 / 0.07).ln()))?,
        })
    }

    /// Normalised pixels `[b, 3, side, side]` to features `[b, embed_dim]`, not yet of length 1.
    pub fn encode_image(&self, pixels: Tensor<4>) -> Result<Tensor<2>, InputError> {
        self.encode_image_observed(pixels, &mut |_, _| {})
    }

    /// [`Clip::encode_image`], showing intermediate results.
    pub fn encode_image_observed(
        &self,
        pixels: Tensor<4>,
        observe: Observer<'_>,
    ) -> Result<Tensor<2>, InputError> {
        self.visual.forward(pixels, observe)
    }

    /// Token ids `[b, t]`, zero after the end of text, to features `[b, embed_dim]`, not yet of
    /// length 1. The end-of-text token has the largest id of each row.
    pub fn encode_text(&self, ids: Tensor<2, Int>) -> Result<Tensor<2>, InputError> {
        self.encode_text_observed(ids, &mut |_, _| {})
    }

    /// [`Clip::encode_text`], showing intermediate results.
    pub fn encode_text_observed(
        &self,
        ids: Tensor<2, Int>,
        observe: Observer<'_>,
    ) -> Result<Tensor<2>, InputError> {
        self.text.forward(ids, observe)
    }

    /// The factor of the similarities in training, `[1]`.
    pub fn logit_scale(&self) -> Tensor<1> {
        self.logit_scale.clone().exp()
    }
}

/// Rows of length 1: `x / max(|x|, 1e-12)`.
pub fn normalize(x: Tensor<2>) -> Tensor<2> {
    let length = x.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(1e-12);
    x / length
}

#[derive(Clone, Debug)]
struct VisionTower {
    conv1: Linear,
    class_embedding: Tensor<1>,      // [width]
    positional_embedding: Tensor<2>, // [1 + patches, width]
    ln_pre: LayerNorm,
    blocks: Vec<Block>,
    ln_post: LayerNorm,
    proj: Linear,
    side: usize,
    patch: usize,
}

impl VisionTower {
    fn new(p: &Params<'_>, config: &ClipConfig) -> Result<Self, WeightError> {
        let vision = &config.vision_cfg;
        let (width, patch) = (vision.width, vision.patch_size);
        let tokens = (vision.image_size / patch).pow(2) + 1;
        let init = Init::Normal((width as f64).powf(-0.5));
        let proj = p.tensor("proj", [width, config.embed_dim], init)?;
        Ok(Self {
            conv1: Linear::patches_without_bias(&p.sub("conv1"), 3, width, patch)?,
            class_embedding: p.tensor("class_embedding", [width], init)?,
            positional_embedding: p.tensor("positional_embedding", [tokens, width], init)?,
            ln_pre: LayerNorm::new(&p.sub("ln_pre"), width, EPS)?,
            blocks: blocks(p, vision.layers, |p| {
                let hidden = (width as f64 * vision.mlp_ratio) as usize;
                Block::new(p, width, hidden, width / vision.head_width, false, config)
            })?,
            ln_post: LayerNorm::new(&p.sub("ln_post"), width, EPS)?,
            proj: Linear::from_tensors(proj.transpose(), None, p.precision()),
            side: vision.image_size,
            patch,
        })
    }

    fn forward(&self, pixels: Tensor<4>, observe: Observer<'_>) -> Result<Tensor<2>, InputError> {
        let [b, channels, h, w] = pixels.dims();
        if [channels, h, w] != [3, self.side, self.side] {
            return Err(InputError {
                model: "CLIP",
                reason: format!(
                    "pictures are [{channels}, {h}, {w}], expected [3, {side}, {side}]",
                    side = self.side
                ),
            });
        }
        let patches = pixel_unshuffle(pixels.permute([0, 2, 3, 1]), self.patch);
        let x = self.conv1.forward(patches); // [b, h / p, w / p, width]
        let [.., width] = x.dims();
        let x = x.reshape([b as i32, -1, width as i32]); // [b, patches, width]
        let class = self.class_embedding.clone().reshape([1, 1, width]);
        let x = Tensor::cat(vec![class.expand([b, 1, width]), x], 1); // [b, tokens, width]
        let x = x + self.positional_embedding.clone().unsqueeze::<3>();
        let mut x = self.ln_pre.forward(x);
        observe("visual.ln_pre", x.clone());
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(x);
            observe(&format!("visual.block.{i}"), x.clone());
        }
        let class = x.slice_dim(1, 0..1).reshape([b, width]);
        Ok(self.proj.forward(self.ln_post.forward(class))) // [b, embed_dim]
    }
}

#[derive(Clone, Debug)]
struct TextTower {
    token_embedding: Tensor<2>,      // [vocabulary, width]
    positional_embedding: Tensor<2>, // [context, width]
    blocks: Vec<Block>,
    ln_final: LayerNorm,
    text_projection: Linear,
}

impl TextTower {
    fn new(p: &Params<'_>, config: &ClipConfig) -> Result<Self, WeightError> {
        let text = &config.text_cfg;
        let width = text.width;
        let init = Init::Normal((width as f64).powf(-0.5));
        let projection = p.tensor("text_projection", [width, config.embed_dim], init)?;
        let embedding = p.sub("token_embedding");
        Ok(Self {
            token_embedding: embedding.tensor(
                "weight",
                [text.vocab_size, width],
                Init::Normal(0.02),
            )?,
            positional_embedding: p.tensor(
                "positional_embedding",
                [text.context_length, width],
                Init::Normal(0.01),
            )?,
            blocks: blocks(p, text.layers, |p| {
                Block::new(p, width, 4 * width, text.heads, true, config)
            })?,
            ln_final: LayerNorm::new(&p.sub("ln_final"), width, EPS)?,
            text_projection: Linear::from_tensors(projection.transpose(), None, p.precision()),
        })
    }

    fn forward(&self, ids: Tensor<2, Int>, observe: Observer<'_>) -> Result<Tensor<2>, InputError> {
        let [_, tokens] = ids.dims();
        let [context, _] = self.positional_embedding.dims();
        let [vocabulary, _] = self.token_embedding.dims();
        let known: Vec<i64> = ids.clone().into_data().iter::<i64>().collect();
        let fits = known.iter().all(|id| (0..vocabulary as i64).contains(id));
        if tokens == 0 || tokens > context || !fits {
            return Err(InputError {
                model: "CLIP",
                reason: format!(
                    "texts are {tokens} tokens with ids up to {}; it reads 1 to {context} tokens of \
                     {vocabulary} ids",
                    known.iter().max().copied().unwrap_or_default()
                ),
            });
        }
        let x = embedding(self.token_embedding.clone(), ids); // [b, t, width]
        let positions = self.positional_embedding.clone().slice_dim(0, 0..tokens);
        let mut x = x + positions.unsqueeze::<3>();
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(x);
            observe(&format!("text.block.{i}"), x.clone());
        }
        let x = self.ln_final.forward(x);
        observe("text.ln_final", x.clone());
        // The end of text is the first of the largest ids.
        let ends = known.chunks_exact(tokens).enumerate().map(|(row, ids)| {
            let end = (0..tokens).fold(0, |best, i| if ids[i] > ids[best] { i } else { best });
            x.clone()
                .slice([row..row + 1, end..end + 1])
                .flatten::<2>(0, 1)
        });
        let pooled = Tensor::cat(ends.collect(), 0); // [b, width]
        Ok(self.text_projection.forward(pooled)) // [b, embed_dim]
    }
}

/// A tower's `transformer.resblocks`.
fn blocks(
    p: &Params<'_>,
    count: usize,
    build: impl Fn(&Params<'_>) -> Result<Block, WeightError>,
) -> Result<Vec<Block>, WeightError> {
    let p = p.sub("transformer").sub("resblocks");
    (0..count).map(|i| build(&p.sub(i))).collect()
}

/// `x + attention(ln_1(x))`, then `x + mlp(ln_2(x))`.
#[derive(Clone, Debug)]
struct Block {
    ln_1: LayerNorm,
    in_proj: Linear,
    out_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    c_proj: Linear,
    shape: AttentionShape,
    quick_gelu: bool,
}

impl Block {
    fn new(
        p: &Params<'_>,
        width: usize,
        hidden: usize,
        heads: usize,
        causal: bool,
        config: &ClipConfig,
    ) -> Result<Self, WeightError> {
        let (attn, mlp) = (p.sub("attn"), p.sub("mlp"));
        let init = Init::Normal((width as f64).powf(-0.5));
        // `torch.nn.MultiheadAttention` keeps q, k and v in one matrix.
        let weight = attn.tensor("in_proj_weight", [3 * width, width], init)?;
        let bias = attn.tensor("in_proj_bias", [3 * width], Init::Zeros)?;
        Ok(Self {
            ln_1: LayerNorm::new(&p.sub("ln_1"), width, EPS)?,
            in_proj: Linear::from_tensors(weight, Some(bias), p.precision()),
            out_proj: Linear::new(&attn.sub("out_proj"), width, width)?,
            ln_2: LayerNorm::new(&p.sub("ln_2"), width, EPS)?,
            c_fc: Linear::new(&mlp.sub("c_fc"), width, hidden)?,
            c_proj: Linear::new(&mlp.sub("c_proj"), hidden, width)?,
            shape: AttentionShape {
                causal,
                ..AttentionShape::full(heads)
            },
            quick_gelu: config.quick_gelu,
        })
    }

    /// `x [b, t, width] -> [b, t, width]`.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [.., width] = x.dims();
        let qkv = self.in_proj.forward(self.ln_1.forward(x.clone())); // [b, t, 3 width]
        let part = |i: usize| qkv.clone().slice_dim(2, i * width..(i + 1) * width);
        let qkv = Qkv {
            q: part(0),
            k: part(1),
            v: part(2),
        };
        let x = x + self.out_proj.forward(attention(qkv, self.shape, None));
        let y = self.c_fc.forward(self.ln_2.forward(x.clone())); // [b, t, hidden]
        let y = match self.quick_gelu {
            true => quick_gelu(y),
            false => gelu(y),
        };
        x + self.c_proj.forward(y)
    }
}
