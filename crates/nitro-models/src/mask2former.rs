//! Mask2Former (arXiv 2112.01527) under Hugging Face's names: a fixed number of queries, each of
//! which answers with a class and a mask. Its Swin-S, trained on COCO instances, is GenEval's detector.
//!
//! The way of a picture: a [`Swin`] gives features at four scales; the pixel decoder mixes the three
//! coarse ones and gives features for masks at a quarter of the resolution; the transformer decoder
//! lets the queries look at one scale after the other, each query only where its last mask was.

mod pixel_decoder;

use burn::tensor::{Tensor, activation};
use nitro_ops::{Activation, cross_attention};
use serde::{Deserialize, Serialize};

use crate::layers::{LayerNorm, Linear};
use crate::swin::{Swin, SwinConfig};
use crate::{Init, InputError, Params, WeightError};
use pixel_decoder::{PixelDecoder, resize, sine_positions};

/// Scales that the queries look at.
const LEVELS: usize = 3;
/// Layer norms of both decoders.
const EPS: f64 = 1e-5;
/// Added to scores of places that a query must not look at.
const HIDDEN: f64 = -1e9;

/// Receives intermediate results with the dimensions that Hugging Face gives them: `backbone.i`
/// `[b, c, h, w]`, `pixel_decoder_last_hidden_state`, `aux.i.masks_queries_logits`, and with a first
/// dimension of 1 `aux.i.class_queries_logits` and `transformer_decoder_last_hidden_state`.
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<4>);

/// Sizes, as `config.json` writes them. What is not given is as in the Swin-S for COCO instances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mask2FormerConfig {
    /// The backbone.
    pub backbone_config: SwinConfig,
    /// Channels of the pixel decoder.
    pub feature_size: usize,
    /// Channels of the features that masks are made of.
    pub mask_feature_size: usize,
    /// Channels of the queries.
    pub hidden_dim: usize,
    /// Hidden channels of the pixel decoder's feed-forward layers.
    pub encoder_feedforward_dim: usize,
    /// Layers of the pixel decoder.
    pub encoder_layers: usize,
    /// Predictions of the transformer decoder; it has one layer less, because the first prediction
    /// comes before the first layer.
    pub decoder_layers: usize,
    /// Heads of all attentions.
    pub num_attention_heads: usize,
    /// Hidden channels of the queries' feed-forward layers.
    pub dim_feedforward: usize,
    /// Queries.
    pub num_queries: usize,
    /// Classes; where it is not given, as many as `id2label` has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_labels: Option<usize>,
    /// Names of the classes by number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id2label: Option<serde_json::Map<String, serde_json::Value>>,
}

impl Default for Mask2FormerConfig {
    fn default() -> Self {
        Self {
            backbone_config: SwinConfig::small(),
            feature_size: 256,
            mask_feature_size: 256,
            hidden_dim: 256,
            encoder_feedforward_dim: 1024,
            encoder_layers: 6,
            decoder_layers: 10,
            num_attention_heads: 8,
            dim_feedforward: 2048,
            num_queries: 100,
            num_labels: None,
            id2label: None,
        }
    }
}

impl Mask2FormerConfig {
    /// Classes of COCO.
    const COCO: usize = 80;

    /// How many classes there are, "no object" not counted.
    pub fn labels(&self) -> usize {
        self.num_labels
            .or_else(|| self.id2label.as_ref().map(serde_json::Map::len))
            .unwrap_or(Self::COCO)
    }

    fn check(&self) -> Result<(), WeightError> {
        let heads = self.num_attention_heads;
        let problem = if self.feature_size != self.hidden_dim {
            "feature_size and hidden_dim differ, which no released model has"
        } else if heads == 0 || !self.hidden_dim.is_multiple_of(heads) {
            "num_attention_heads does not divide hidden_dim"
        } else if !self.feature_size.is_multiple_of(pixel_decoder::GROUPS) {
            "feature_size is no multiple of 32, the groups of its norms"
        } else if self.backbone_config.depths.len() != LEVELS + 1 {
            "the backbone must have four stages"
        } else if self.decoder_layers == 0 {
            "decoder_layers is 0"
        } else {
            return Ok(());
        };
        Err(WeightError::Config {
            origin: "Mask2Former configuration".to_owned(),
            reason: problem.to_owned(),
        })
    }
}

/// What the queries answer.
#[derive(Clone, Debug)]
pub struct Segments {
    /// Class logits `[b, queries, labels + 1]`; the last class is "no object".
    pub classes: Tensor<3>,
    /// Mask logits `[b, queries, h / 4, w / 4]`.
    pub masks: Tensor<4>,
}

/// The detector.
#[derive(Clone, Debug)]
pub struct Mask2Former {
    encoder: Swin,
    decoder: PixelDecoder,
    transformer: QueryDecoder,
    class_predictor: Linear,
}

impl Mask2Former {
    /// Tensors of released files that inference does not need: index tables, and the loss's weights.
    pub const UNUSED: [&'static str; 2] = ["relative_position_index", "criterion."];

    /// The model of `config`.
    pub fn new(config: &Mask2FormerConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let (model, labels) = (p.sub("model"), config.labels());
        let pixels = model.sub("pixel_level_module");
        Ok(Self {
            encoder: Swin::new(&config.backbone_config, &pixels.sub("encoder"))?,
            decoder: PixelDecoder::new(&pixels.sub("decoder"), config)?,
            transformer: QueryDecoder::new(&model.sub("transformer_module"), config)?,
            class_predictor: Linear::new(&p.sub("class_predictor"), config.hidden_dim, labels + 1)?,
        })
    }

    /// Normalised pixels `[b, 3, h, w]` to classes and masks.
    pub fn forward(&self, pixels: Tensor<4>) -> Result<Segments, InputError> {
        self.forward_observed(pixels, &mut |_, _| {})
    }

    /// [`Mask2Former::forward`], showing intermediate results.
    pub fn forward_observed(
        &self,
        pixels: Tensor<4>,
        observe: Observer<'_>,
    ) -> Result<Segments, InputError> {
        let [_, channels, h, w] = pixels.dims();
        if channels != 3 || h == 0 || w == 0 {
            return Err(InputError {
                model: "Mask2Former",
                reason: format!("pictures are [{channels}, {h}, {w}], expected [3, height, width]"),
            });
        }
        let features = self.encoder.forward(pixels.permute([0, 2, 3, 1]));
        for (i, feature) in features.iter().enumerate() {
            observe(&format!("backbone.{i}"), to_nchw(feature.clone()));
        }
        let (levels, mask_features) = self.decoder.forward(features);
        let mask_features = to_nchw(mask_features); // [b, mask_feature_size, h / 4, w / 4]
        observe("pixel_decoder_last_hidden_state", mask_features.clone());
        let last = self.transformer.layers.len();
        let mut answer = None;
        let x = self
            .transformer
            .forward(levels, mask_features, &mut |i, queries, masks| {
                let classes = self.class_predictor.forward(queries);
                if i == last {
                    answer = Some(Segments { classes, masks });
                } else {
                    let name = |what: &str| format!("aux.{i}.{what}_queries_logits");
                    observe(&name("class"), classes.unsqueeze());
                    observe(&name("masks"), masks);
                }
            });
        observe("transformer_decoder_last_hidden_state", x.unsqueeze());
        answer.ok_or_else(|| InputError {
            model: "Mask2Former",
            reason: "the decoder made no prediction".to_owned(),
        })
    }
}

fn to_nchw(x: Tensor<4>) -> Tensor<4> {
    x.permute([0, 3, 1, 2])
}

/// The transformer decoder: queries against the pixel decoder's features.
#[derive(Clone, Debug)]
struct QueryDecoder {
    queries_embedder: Tensor<2>, // positions of the queries, [queries, hidden]
    queries_features: Tensor<2>, // what they start from, [queries, hidden]
    level_embed: Tensor<2>,      // [LEVELS, hidden]
    layers: Vec<QueryLayer>,
    layernorm: LayerNorm,
    mask_embedder: [Linear; 3],
}

impl QueryDecoder {
    fn new(p: &Params<'_>, config: &Mask2FormerConfig) -> Result<Self, WeightError> {
        let (hidden, queries) = (config.hidden_dim, config.num_queries);
        let table = |name: &str, rows| {
            p.sub(name)
                .tensor("weight", [rows, hidden], Init::Normal(0.02))
        };
        let decoder = p.sub("decoder");
        let embedder = decoder.sub("mask_predictor").sub("mask_embedder");
        let embed = |i: usize, outputs| Linear::new(&embedder.sub(i).sub(0), hidden, outputs);
        Ok(Self {
            queries_embedder: table("queries_embedder", queries)?,
            queries_features: table("queries_features", queries)?,
            level_embed: table("level_embed", LEVELS)?,
            layers: (0..config.decoder_layers - 1)
                .map(|i| QueryLayer::new(&decoder.sub("layers").sub(i), config))
                .collect::<Result<_, _>>()?,
            layernorm: LayerNorm::new(&decoder.sub("layernorm"), hidden, EPS)?,
            mask_embedder: [
                embed(0, hidden)?,
                embed(1, hidden)?,
                embed(2, config.mask_feature_size)?,
            ],
        })
    }

    /// `levels`, coarsest first, each `[b, h, w, hidden]`, and `mask_features [b, c, h, w]` to the last
    /// state of the queries, `[b, queries, hidden]`. `predict` gets each prediction: its number, the
    /// normalised queries and the mask logits `[b, queries, h, w]`.
    fn forward(
        &self,
        levels: Vec<Tensor<4>>,
        mask_features: Tensor<4>,
        predict: &mut dyn FnMut(usize, Tensor<3>, Tensor<4>),
    ) -> Tensor<3> {
        let [b, ..] = mask_features.dims();
        let [queries, hidden] = self.queries_features.dims();
        let sizes: Vec<[usize; 2]> = levels.iter().map(|x| [x.dims()[1], x.dims()[2]]).collect();
        let memory: Vec<(Tensor<3>, Tensor<3>)> = (levels.into_iter().enumerate())
            .map(|(i, level)| {
                let [_, h, w, _] = level.dims();
                let embed = self.level_embed.clone().slice_dim(0, i..i + 1);
                let values = level.reshape([b, h * w, hidden]) + embed.unsqueeze::<3>();
                let positions = sine_positions(sizes[i], hidden, &values.device());
                let keys = values.clone() + positions.unsqueeze::<3>();
                (keys, values)
            })
            .collect();
        let repeat = |x: &Tensor<2>| x.clone().unsqueeze::<3>().expand([b, queries, hidden]);
        let positions = repeat(&self.queries_embedder);
        let mut x = repeat(&self.queries_features);
        for (i, layer) in self.layers.iter().enumerate() {
            let level = i % LEVELS;
            let (normed, masks) = self.masks(x.clone(), mask_features.clone());
            predict(i, normed, masks.clone());
            let bias = hide_outside(masks, sizes[level]);
            let (keys, values) = memory[level].clone();
            x = layer.forward(x, positions.clone(), keys, values, bias);
        }
        let (normed, masks) = self.masks(x.clone(), mask_features);
        predict(self.layers.len(), normed, masks);
        x
    }

    /// The normalised queries, and their masks `[b, queries, h, w]`.
    fn masks(&self, x: Tensor<3>, features: Tensor<4>) -> (Tensor<3>, Tensor<4>) {
        let [b, c, h, w] = features.dims();
        let x = self.layernorm.forward(x);
        let [_, queries, _] = x.dims();
        let [first, second, third] = &self.mask_embedder;
        let y = first.forward_with(x.clone(), Activation::Relu);
        let y = second.forward_with(y, Activation::Relu);
        let y = third.forward(y); // [b, queries, c]
        let masks = y.matmul(features.reshape([b, c, h * w]));
        (x, masks.reshape([b, queries, h, w]))
    }
}

/// Scores' bias `[b, 1, queries, h w]` that lets each query look only where its mask is; a query
/// whose mask is empty may look everywhere.
fn hide_outside(masks: Tensor<4>, [h, w]: [usize; 2]) -> Tensor<4> {
    let [b, queries, rows, columns] = masks.dims();
    let planes = resize(masks.reshape([b * queries, rows, columns]), [h, w]);
    let outside = activation::sigmoid(planes).lower_elem(0.5).float();
    let outside = outside.reshape([b, queries, h * w]);
    let somewhere = outside
        .clone()
        .neg()
        .add_scalar(1.0)
        .sum_dim(2)
        .greater_elem(0.5)
        .float(); // [b, queries, 1]
    (outside * somewhere * HIDDEN).unsqueeze_dim(1)
}

/// Attention to the picture, among the queries, and a feed-forward layer; each `norm(x + f(x))`.
#[derive(Clone, Debug)]
struct QueryLayer {
    cross_attn: Attention,
    cross_attn_layer_norm: LayerNorm,
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_layer_norm: LayerNorm,
}

impl QueryLayer {
    fn new(p: &Params<'_>, config: &Mask2FormerConfig) -> Result<Self, WeightError> {
        let (hidden, inner) = (config.hidden_dim, config.dim_feedforward);
        let heads = config.num_attention_heads;
        let norm = |name: &str| LayerNorm::new(&p.sub(name), hidden, EPS);
        Ok(Self {
            cross_attn: Attention::packed(&p.sub("cross_attn"), hidden, heads)?,
            cross_attn_layer_norm: norm("cross_attn_layer_norm")?,
            self_attn: Attention::separate(&p.sub("self_attn"), hidden, heads)?,
            self_attn_layer_norm: norm("self_attn_layer_norm")?,
            fc1: Linear::new(&p.sub("fc1"), hidden, inner)?,
            fc2: Linear::new(&p.sub("fc2"), inner, hidden)?,
            final_layer_norm: norm("final_layer_norm")?,
        })
    }

    /// `x` and `positions` `[b, queries, hidden]`, `keys` and `values` `[b, h w, hidden]`.
    fn forward(
        &self,
        x: Tensor<3>,
        positions: Tensor<3>,
        keys: Tensor<3>,
        values: Tensor<3>,
        bias: Tensor<4>,
    ) -> Tensor<3> {
        let placed = x.clone() + positions.clone();
        let y = self.cross_attn.forward(placed, keys, values, Some(bias));
        let x = self.cross_attn_layer_norm.forward(x + y);
        let placed = x.clone() + positions;
        let y = self
            .self_attn
            .forward(placed.clone(), placed, x.clone(), None);
        let x = self.self_attn_layer_norm.forward(x + y);
        let y = self.fc1.forward_with(x.clone(), Activation::Relu);
        self.final_layer_norm.forward(x + self.fc2.forward(y))
    }
}

/// Multi-head attention.
#[derive(Clone, Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl Attention {
    /// With a matrix each for queries, keys and values.
    fn separate(p: &Params<'_>, width: usize, heads: usize) -> Result<Self, WeightError> {
        let project = |name: &str| Linear::new(&p.sub(name), width, width);
        Ok(Self {
            q_proj: project("q_proj")?,
            k_proj: project("k_proj")?,
            v_proj: project("v_proj")?,
            out_proj: project("out_proj")?,
            heads,
        })
    }

    /// With all three in one, as `torch.nn.MultiheadAttention` keeps them.
    fn packed(p: &Params<'_>, width: usize, heads: usize) -> Result<Self, WeightError> {
        let init = Init::Normal((width as f64).powf(-0.5));
        let weight = p.tensor::<2>("in_proj_weight", [3 * width, width], init)?;
        let bias = p.tensor::<1>("in_proj_bias", [3 * width], Init::Zeros)?;
        let part = |i: usize| {
            let rows = i * width..(i + 1) * width;
            let bias = bias.clone().slice_dim(0, rows.clone());
            Linear::from_tensors(weight.clone().slice_dim(0, rows), Some(bias), p.precision())
        };
        Ok(Self {
            q_proj: part(0),
            k_proj: part(1),
            v_proj: part(2),
            out_proj: Linear::new(&p.sub("out_proj"), width, width)?,
            heads,
        })
    }

    fn forward(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        bias: Option<Tensor<4>>,
    ) -> Tensor<3> {
        self.out_proj.forward(cross_attention(
            self.q_proj.forward(q),
            self.k_proj.forward(k),
            self.v_proj.forward(v),
            self.heads,
            bias,
        ))
    }
}
