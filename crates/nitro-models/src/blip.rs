//! ImageReward (arXiv 2304.05977): a BLIP that reads a prompt while looking at a picture, and a linear
//! head that says how much people would like the picture for the prompt.
//!
//! Names are those of `ImageReward.pt`. The picture goes through a pre-norm ViT; the prompt through a
//! post-norm BERT whose every layer also attends to the picture's tokens; the first token's feature
//! through five linear layers without activations between them.

use burn::tensor::module::embedding;
use burn::tensor::{Bool, Int, Tensor};
use nitro_ops::{AttentionShape, Qkv, attention, cross_attention, gelu, pixel_unshuffle};
use serde::{Deserialize, Serialize};

use crate::layers::{LayerNorm, Linear};
use crate::{Init, InputError, Params, WeightError};

/// Layer norms of the ViT.
const VIT_EPS: f64 = 1e-6;
/// Widths between the linear layers of the head.
const HEAD: [(&str, usize); 5] = [("0", 1024), ("2", 128), ("4", 64), ("6", 16), ("7", 1)];

/// Receives intermediate results: `image_embeds`, `text_hidden.i` (0 is the embeddings),
/// `txt_features` and `mlp_out` (their tokens dimension is 1).
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<3>);

/// Sizes of both halves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRewardConfig {
    /// The text's half, as `med_config.json` writes it.
    pub med_config: MedConfig,
    /// The picture's half.
    #[serde(default)]
    pub vit: VitConfig,
    /// Mean of the head's answers over the training pairs.
    #[serde(default = "reward_mean")]
    pub mean: f64,
    /// Their standard deviation.
    #[serde(default = "reward_std")]
    pub std: f64,
}

fn reward_mean() -> f64 {
    0.167_173_628_300_524_26
}

fn reward_std() -> f64 {
    1.033_339_496_605_407_2
}

/// BLIP's BERT ("mixture of encoder-decoder").
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MedConfig {
    /// Channels.
    pub hidden_size: usize,
    /// Channels between the feed-forward layers.
    pub intermediate_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Longest text.
    pub max_position_embeddings: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Token ids.
    pub vocab_size: usize,
}

/// The vision transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VitConfig {
    /// Pixels on a side.
    pub img_size: usize,
    /// Pixels on a patch's side.
    pub patch_size: usize,
    /// Channels.
    pub embed_dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Heads.
    pub num_heads: usize,
    /// Hidden channels of the feed-forward layers, per channel.
    pub mlp_ratio: f64,
}

impl Default for VitConfig {
    /// ViT-L/16 at 224 pixels, ImageReward's.
    fn default() -> Self {
        Self {
            img_size: 224,
            patch_size: 16,
            embed_dim: 1024,
            depth: 24,
            num_heads: 16,
            mlp_ratio: 4.0,
        }
    }
}

impl ImageRewardConfig {
    /// The released model's scale of rewards, with these halves.
    pub fn new(med_config: MedConfig, vit: VitConfig) -> Self {
        Self {
            med_config,
            vit,
            mean: reward_mean(),
            std: reward_std(),
        }
    }

    fn check(&self) -> Result<(), WeightError> {
        let divides =
            |part: usize, whole: usize| part > 0 && whole > 0 && whole.is_multiple_of(part);
        let problem = if !divides(self.vit.patch_size, self.vit.img_size) {
            "patch_size does not divide img_size"
        } else if !divides(self.vit.num_heads, self.vit.embed_dim) {
            "num_heads does not divide embed_dim"
        } else if !divides(
            self.med_config.num_attention_heads,
            self.med_config.hidden_size,
        ) {
            "num_attention_heads does not divide hidden_size"
        } else {
            return Ok(());
        };
        Err(WeightError::Config {
            origin: "ImageReward configuration".to_owned(),
            reason: problem.to_owned(),
        })
    }
}

/// The reward model.
#[derive(Clone, Debug)]
pub struct ImageReward {
    visual_encoder: VisionTransformer,
    text_encoder: TextEncoder,
    mlp: Vec<Linear>,
    mean: f64,
    std: f64,
}

impl ImageReward {
    /// Tensors of `ImageReward.pt` that rewards do not need: BLIP's contrastive heads, and buffers.
    pub const UNUSED: [&'static str; 3] = ["vision_proj.", "text_proj.", "position_ids"];

    /// The model of `config`.
    pub fn new(config: &ImageRewardConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let blip = p.sub("blip");
        let mut width = config.med_config.hidden_size;
        let mlp = HEAD.iter().map(|&(name, outputs)| {
            let layer = Linear::new(&p.sub("mlp").sub("layers").sub(name), width, outputs);
            width = outputs;
            layer
        });
        Ok(Self {
            mlp: mlp.collect::<Result<_, _>>()?,
            visual_encoder: VisionTransformer::new(&blip.sub("visual_encoder"), &config.vit)?,
            text_encoder: TextEncoder::new(&blip.sub("text_encoder"), config)?,
            mean: config.mean,
            std: config.std,
        })
    }

    /// Rewards `[b]` of normalised pixels `[b, 3, side, side]` for token ids `[b, t]`, whose `mask` is
    /// true where there is a token.
    pub fn forward(
        &self,
        pixels: Tensor<4>,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
    ) -> Result<Tensor<1>, InputError> {
        self.forward_observed(pixels, ids, mask, &mut |_, _| {})
    }

    /// [`ImageReward::forward`], showing intermediate results.
    pub fn forward_observed(
        &self,
        pixels: Tensor<4>,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        observe: Observer<'_>,
    ) -> Result<Tensor<1>, InputError> {
        let image = self.visual_encoder.forward(pixels)?; // [b, 1 + patches, embed_dim]
        observe("image_embeds", image.clone());
        let hidden = self.text_encoder.forward(ids, mask, image, observe)?; // [b, t, hidden]
        let mut x = hidden.slice_dim(1, 0..1); // [CLS], [b, 1, hidden]
        observe("txt_features", x.clone());
        for layer in &self.mlp {
            x = layer.forward(x);
        }
        observe("mlp_out", x.clone());
        Ok((x.flatten::<1>(0, 2) - self.mean) / self.std)
    }
}

#[derive(Clone, Debug)]
struct VisionTransformer {
    patch_embed: Linear,
    cls_token: Tensor<3>, // [1, 1, embed_dim]
    pos_embed: Tensor<3>, // [1, 1 + patches, embed_dim]
    blocks: Vec<VitBlock>,
    norm: LayerNorm,
    side: usize,
    patch: usize,
}

impl VisionTransformer {
    fn new(p: &Params<'_>, config: &VitConfig) -> Result<Self, WeightError> {
        let (width, patch) = (config.embed_dim, config.patch_size);
        let tokens = (config.img_size / patch).pow(2) + 1;
        let proj = p.sub("patch_embed").sub("proj");
        let init = Init::Normal(0.02);
        Ok(Self {
            patch_embed: Linear::patches(&proj, 3, width, patch)?,
            cls_token: p.tensor("cls_token", [1, 1, width], init)?,
            pos_embed: p.tensor("pos_embed", [1, tokens, width], init)?,
            blocks: (0..config.depth)
                .map(|i| VitBlock::new(&p.sub("blocks").sub(i), config))
                .collect::<Result<_, _>>()?,
            norm: LayerNorm::new(&p.sub("norm"), width, VIT_EPS)?,
            side: config.img_size,
            patch,
        })
    }

    fn forward(&self, pixels: Tensor<4>) -> Result<Tensor<3>, InputError> {
        let [b, channels, h, w] = pixels.dims();
        if [channels, h, w] != [3, self.side, self.side] {
            return Err(InputError {
                model: "ImageReward",
                reason: format!(
                    "pictures are [{channels}, {h}, {w}], expected [3, {side}, {side}]",
                    side = self.side
                ),
            });
        }
        let patches = pixel_unshuffle(pixels.permute([0, 2, 3, 1]), self.patch);
        let x = self.patch_embed.forward(patches); // [b, h / p, w / p, embed_dim]
        let [.., width] = x.dims();
        let x = x.reshape([b as i32, -1, width as i32]); // [b, patches, embed_dim]
        let class = self.cls_token.clone().expand([b, 1, width]);
        let mut x = Tensor::cat(vec![class, x], 1) + self.pos_embed.clone();
        for block in &self.blocks {
            x = block.forward(x);
        }
        Ok(self.norm.forward(x))
    }
}

/// `x + attention(norm1(x))`, then `x + mlp(norm2(x))`.
#[derive(Clone, Debug)]
struct VitBlock {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl VitBlock {
    fn new(p: &Params<'_>, config: &VitConfig) -> Result<Self, WeightError> {
        let width = config.embed_dim;
        let hidden = (width as f64 * config.mlp_ratio) as usize;
        let (attn, mlp) = (p.sub("attn"), p.sub("mlp"));
        Ok(Self {
            norm1: LayerNorm::new(&p.sub("norm1"), width, VIT_EPS)?,
            qkv: Linear::new(&attn.sub("qkv"), width, 3 * width)?,
            proj: Linear::new(&attn.sub("proj"), width, width)?,
            norm2: LayerNorm::new(&p.sub("norm2"), width, VIT_EPS)?,
            fc1: Linear::new(&mlp.sub("fc1"), width, hidden)?,
            fc2: Linear::new(&mlp.sub("fc2"), hidden, width)?,
            heads: config.num_heads,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [.., width] = x.dims();
        let qkv = self.qkv.forward(self.norm1.forward(x.clone())); // [b, t, 3 width]
        let part = |i: usize| qkv.clone().slice_dim(2, i * width..(i + 1) * width);
        let qkv = Qkv {
            q: part(0),
            k: part(1),
            v: part(2),
        };
        let x = x + self
            .proj
            .forward(attention(qkv, AttentionShape::full(self.heads), None));
        let y = gelu(self.fc1.forward(self.norm2.forward(x.clone()))); // [b, t, hidden]
        x + self.fc2.forward(y)
    }
}

#[derive(Clone, Debug)]
struct TextEncoder {
    word_embeddings: Tensor<2>,     // [vocabulary, hidden]
    position_embeddings: Tensor<2>, // [positions, hidden]
    norm: LayerNorm,
    layers: Vec<TextLayer>,
}

impl TextEncoder {
    fn new(p: &Params<'_>, config: &ImageRewardConfig) -> Result<Self, WeightError> {
        let med = &config.med_config;
        let (hidden, eps) = (med.hidden_size, med.layer_norm_eps);
        let embeddings = p.sub("embeddings");
        let table = |name: &str, rows: usize| {
            let init = Init::Normal(0.02);
            embeddings.sub(name).tensor("weight", [rows, hidden], init)
        };
        Ok(Self {
            word_embeddings: table("word_embeddings", med.vocab_size)?,
            position_embeddings: table("position_embeddings", med.max_position_embeddings)?,
            norm: LayerNorm::new(&embeddings.sub("LayerNorm"), hidden, eps)?,
            layers: (0..med.num_hidden_layers)
                .map(|i| TextLayer::new(&p.sub("encoder").sub("layer").sub(i), config))
                .collect::<Result<_, _>>()?,
        })
    }

    fn forward(
        &self,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        image: Tensor<3>,
        observe: Observer<'_>,
    ) -> Result<Tensor<3>, InputError> {
        let [_, tokens] = ids.dims();
        let [positions, _] = self.position_embeddings.dims();
        let [vocabulary, _] = self.word_embeddings.dims();
        let largest = ids.clone().into_data().iter::<i64>().max().unwrap_or(0);
        if ids.dims() != mask.dims() || tokens > positions || largest >= vocabulary as i64 {
            return Err(InputError {
                model: "ImageReward",
                reason: format!(
                    "ids are {:?} up to {largest}, their mask is {:?}; it reads up to {positions} \
                     tokens of {vocabulary} ids",
                    ids.dims(),
                    mask.dims()
                ),
            });
        }
        let positions = self.position_embeddings.clone().slice_dim(0, 0..tokens);
        let x = embedding(self.word_embeddings.clone(), ids) + positions.unsqueeze::<3>();
        let mut x = self.norm.forward(x); // [b, t, hidden]
        observe("text_hidden.0", x.clone());
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, mask.clone(), image.clone());
            observe(&format!("text_hidden.{}", i + 1), x.clone());
        }
        Ok(x)
    }
}

/// Self-attention, attention to the picture, feed-forward; each `norm(x + f(x))`.
#[derive(Clone, Debug)]
struct TextLayer {
    attention: Projections,
    crossattention: Projections,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    heads: usize,
}

/// What attention computes its queries, keys, values and output with.
#[derive(Clone, Debug)]
struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    norm: LayerNorm,
}

impl Projections {
    /// Keys and values come from features of `source` channels.
    fn new(p: &Params<'_>, med: &MedConfig, source: usize) -> Result<Self, WeightError> {
        let hidden = med.hidden_size;
        let (own, output) = (p.sub("self"), p.sub("output"));
        Ok(Self {
            query: Linear::new(&own.sub("query"), hidden, hidden)?,
            key: Linear::new(&own.sub("key"), source, hidden)?,
            value: Linear::new(&own.sub("value"), source, hidden)?,
            dense: Linear::new(&output.sub("dense"), hidden, hidden)?,
            norm: LayerNorm::new(&output.sub("LayerNorm"), hidden, med.layer_norm_eps)?,
        })
    }
}

impl TextLayer {
    fn new(p: &Params<'_>, config: &ImageRewardConfig) -> Result<Self, WeightError> {
        let med = &config.med_config;
        let (hidden, inner) = (med.hidden_size, med.intermediate_size);
        let output = p.sub("output");
        Ok(Self {
            attention: Projections::new(&p.sub("attention"), med, hidden)?,
            crossattention: Projections::new(&p.sub("crossattention"), med, config.vit.embed_dim)?,
            intermediate: Linear::new(&p.sub("intermediate").sub("dense"), hidden, inner)?,
            output: Linear::new(&output.sub("dense"), inner, hidden)?,
            output_norm: LayerNorm::new(&output.sub("LayerNorm"), hidden, med.layer_norm_eps)?,
            heads: med.num_attention_heads,
        })
    }

    fn forward(&self, x: Tensor<3>, mask: Tensor<2, Bool>, image: Tensor<3>) -> Tensor<3> {
        let own = &self.attention;
        let qkv = Qkv {
            q: own.query.forward(x.clone()),
            k: own.key.forward(x.clone()),
            v: own.value.forward(x.clone()),
        };
        let y = attention(qkv, AttentionShape::full(self.heads), Some(mask));
        let x = own.norm.forward(x + own.dense.forward(y));

        let cross = &self.crossattention;
        let y = cross_attention(
            cross.query.forward(x.clone()),
            cross.key.forward(image.clone()),
            cross.value.forward(image),
            self.heads,
            None,
        );
        let x = cross.norm.forward(x + cross.dense.forward(y));

        let y = self
            .output
            .forward(gelu(self.intermediate.forward(x.clone())));
        self.output_norm.forward(x + y)
    }
}
