//! Mask2Former's pixel decoder: deformable attention over three scales, then one step of a feature
//! pyramid up to a quarter of the resolution. Images are channel-last.

use std::f64::consts::TAU;

use burn::tensor::{Device, Tensor, TensorData, activation};
use nitro_ops::{Activation, deformable_attention, layer_norm_modulate};

use super::{EPS, LEVELS, Mask2FormerConfig};
use crate::layers::{Conv2d, ConvSpec, LayerNorm, Linear};
use crate::{Init, Params, WeightError};

/// Groups of every group norm.
pub(super) const GROUPS: usize = 32;
/// Points that a head reads from each scale.
const POINTS: usize = 4;

#[derive(Clone, Debug)]
pub(super) struct PixelDecoder {
    /// Coarsest first.
    input_projections: Vec<(Linear, GroupNorm)>,
    level_embed: Tensor<2>, // [LEVELS, feature_size]
    layers: Vec<DeformableLayer>,
    adapter_1: (Linear, GroupNorm),
    layer_1: (Conv2d, GroupNorm),
    mask_projection: Linear,
}

impl PixelDecoder {
    pub(super) fn new(p: &Params<'_>, config: &Mask2FormerConfig) -> Result<Self, WeightError> {
        let width = config.feature_size;
        let channels = config.backbone_config.channels();
        let (adapter, layer) = (p.sub("adapter_1"), p.sub("layer_1"));
        let conv = ConvSpec {
            bias: false,
            ..ConvSpec::new(width, width, 3)
        };
        let inputs = channels[1..].iter().rev().enumerate().map(|(i, &inputs)| {
            let p = p.sub("input_projections").sub(i);
            let project = Linear::pointwise(&p.sub(0), inputs, width, true)?;
            Ok((project, GroupNorm::new(&p.sub(1), width)?))
        });
        let masks = config.mask_feature_size;
        Ok(Self {
            input_projections: inputs.collect::<Result<_, WeightError>>()?,
            level_embed: p.tensor("level_embed", [LEVELS, width], Init::Normal(0.02))?,
            layers: (0..config.encoder_layers)
                .map(|i| DeformableLayer::new(&p.sub("encoder").sub("layers").sub(i), config))
                .collect::<Result<_, _>>()?,
            adapter_1: (
                Linear::pointwise(&adapter.sub(0), channels[0], width, false)?,
                GroupNorm::new(&adapter.sub(1), width)?,
            ),
            layer_1: (
                Conv2d::new(&layer.sub(0), conv)?,
                GroupNorm::new(&layer.sub(1), width)?,
            ),
            mask_projection: Linear::pointwise(&p.sub("mask_projection"), width, masks, true)?,
        })
    }

    /// The backbone's features, finest first, to the three mixed scales, coarsest first, each
    /// `[b, h, w, feature_size]`, and the features of masks `[b, h / 4, w / 4, mask_feature_size]`.
    pub(super) fn forward(&self, mut features: Vec<Tensor<4>>) -> (Vec<Tensor<4>>, Tensor<4>) {
        let finest = features.remove(0);
        let [b, ..] = finest.dims();
        let device = finest.device();
        let (mut tokens, mut places, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        let projections = self.input_projections.iter().enumerate();
        for ((i, (project, norm)), feature) in projections.zip(features.into_iter().rev()) {
            let x = norm.forward(project.forward(feature)); // [b, h, w, feature_size]
            let [_, h, w, width] = x.dims();
            tokens.push(x.reshape([b, h * w, width]));
            let level = self.level_embed.clone().slice_dim(0, i..i + 1);
            places.push(sine_positions([h, w], width, &device) + level);
            sizes.push([h, w]);
        }
        let places = Tensor::cat(places, 0).unsqueeze::<3>(); // [1, tokens, feature_size]
        let points = reference_points(&sizes, &device);
        let mut x = Tensor::cat(tokens, 1); // [b, tokens, feature_size]
        for layer in &self.layers {
            x = layer.forward(x, places.clone(), points.clone(), &sizes);
        }
        let mut first = 0;
        let levels: Vec<Tensor<4>> = (sizes.iter())
            .map(|&[h, w]| {
                let level = x.clone().slice_dim(1, first..first + h * w);
                first += h * w;
                let [_, _, width] = level.dims();
                level.reshape([b, h, w, width])
            })
            .collect();

        let (lateral, norm) = &self.adapter_1;
        let fine = norm.forward(lateral.forward(finest)); // [b, h / 4, w / 4, feature_size]
        let [_, h, w, _] = fine.dims();
        let coarse = resize_images(levels[LEVELS - 1].clone(), [h, w]);
        let (conv, norm) = &self.layer_1;
        let x = activation::relu(norm.forward(conv.forward(fine + coarse)));
        (levels, self.mask_projection.forward(x))
    }
}

/// Where each token stands, `[1, tokens, 1, 2]`: x and y of its centre, 0 to 1 across its level.
fn reference_points(sizes: &[[usize; 2]], device: &Device) -> Tensor<4> {
    let points: Vec<f32> = sizes
        .iter()
        .flat_map(|&[h, w]| (0..h * w).map(move |i| (i % w, i / w, w, h)))
        .flat_map(|(x, y, w, h)| [(x as f32 + 0.5) / w as f32, (y as f32 + 0.5) / h as f32])
        .collect();
    let tokens = points.len() / 2;
    Tensor::from_data(TensorData::new(points, [1, tokens, 1, 2]), device)
}

/// Deformable attention and a feed-forward layer; each `norm(x + f(x))`.
#[derive(Clone, Debug)]
struct DeformableLayer {
    sampling_offsets: Linear,
    attention_weights: Linear,
    value_proj: Linear,
    output_proj: Linear,
    self_attn_layer_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_layer_norm: LayerNorm,
    heads: usize,
}

impl DeformableLayer {
    fn new(p: &Params<'_>, config: &Mask2FormerConfig) -> Result<Self, WeightError> {
        let (width, inner) = (config.feature_size, config.encoder_feedforward_dim);
        let heads = config.num_attention_heads;
        let samples = heads * LEVELS * POINTS;
        let attn = p.sub("self_attn");
        let norm = |name: &str| LayerNorm::new(&p.sub(name), width, EPS);
        Ok(Self {
            sampling_offsets: Linear::new(&attn.sub("sampling_offsets"), width, 2 * samples)?,
            attention_weights: Linear::new(&attn.sub("attention_weights"), width, samples)?,
            value_proj: Linear::new(&attn.sub("value_proj"), width, width)?,
            output_proj: Linear::new(&attn.sub("output_proj"), width, width)?,
            self_attn_layer_norm: norm("self_attn_layer_norm")?,
            fc1: Linear::new(&p.sub("fc1"), width, inner)?,
            fc2: Linear::new(&p.sub("fc2"), inner, width)?,
            final_layer_norm: norm("final_layer_norm")?,
            heads,
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        places: Tensor<3>,
        points: Tensor<4>,
        sizes: &[[usize; 2]],
    ) -> Tensor<3> {
        let [b, tokens, width] = x.dims();
        let (heads, samples) = (self.heads, LEVELS * POINTS);
        let query = x.clone() + places;
        let value = self.value_proj.forward(x.clone());
        let value = value.reshape([b, tokens, heads, width / heads]);
        let weights = self.attention_weights.forward(query.clone());
        let weights = activation::softmax(weights.reshape([b, tokens, heads, samples]), 3);
        // Offsets are in pixels of the level they reach into.
        let pixels: Vec<f32> = (0..heads)
            .flat_map(|_| sizes.iter().flat_map(|size| [size; POINTS]))
            .flat_map(|&[h, w]| [w as f32, h as f32])
            .collect();
        let pixels = TensorData::new(pixels, [1, 1, heads * samples, 2]);
        let offsets = self
            .sampling_offsets
            .forward(query)
            .reshape([b, tokens, heads * samples, 2]);
        let locations = points + offsets / Tensor::from_data(pixels, &x.device());
        let y = deformable_attention(value, locations, weights, sizes);
        let x = self
            .self_attn_layer_norm
            .forward(x + self.output_proj.forward(y));
        let y = self.fc1.forward_with(x.clone(), Activation::Relu);
        self.final_layer_norm.forward(x + self.fc2.forward(y))
    }
}

/// `torch.nn.GroupNorm(32, width)`.
#[derive(Clone, Debug)]
struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
}

impl GroupNorm {
    fn new(p: &Params<'_>, width: usize) -> Result<Self, WeightError> {
        Ok(Self {
            weight: p.tensor("weight", [width], Init::Ones)?,
            bias: p.tensor("bias", [width], Init::Zeros)?,
        })
    }

    /// `x [b, h, w, c] -> [b, h, w, c]`.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, h, w, c] = x.dims();
        let each = c / GROUPS;
        let x = x
            .reshape([b, h * w, GROUPS, each])
            .swap_dims(1, 2)
            .reshape([b, GROUPS, h * w * each]);
        let x = layer_norm_modulate(x, None, None, EPS)
            .reshape([b, GROUPS, h * w, each])
            .swap_dims(1, 2)
            .reshape([b, h, w, c]);
        x * self.weight.clone().unsqueeze::<4>() + self.bias.clone().unsqueeze::<4>()
    }
}

/// Sine and cosine positions `[h w, width]`: half of the channels for the row, half for the column.
pub(super) fn sine_positions([h, w]: [usize; 2], width: usize, device: &Device) -> Tensor<2> {
    let half = width / 2;
    let angle = |i: usize, size: usize, channel: usize| {
        let place = (i + 1) as f64 / (size as f64 + 1e-6) * TAU;
        place / 10_000f64.powf((2 * (channel / 2)) as f64 / half as f64)
    };
    let wave = |i: usize, size: usize, channel: usize| match channel % 2 {
        0 => angle(i, size, channel).sin() as f32,
        _ => angle(i, size, channel).cos() as f32,
    };
    let mut values = Vec::with_capacity(h * w * width);
    for i in 0..h * w {
        values.extend((0..half).map(|channel| wave(i / w, h, channel)));
        values.extend((0..half).map(|channel| wave(i % w, w, channel)));
    }
    Tensor::from_data(TensorData::new(values, [h * w, 2 * half]), device)
}

/// Planes `[n, h, w]` to another size, bilinearly (`align_corners=False`, no antialiasing).
pub(super) fn resize(x: Tensor<3>, to: [usize; 2]) -> Tensor<3> {
    let [_, h, w] = x.dims();
    if [h, w] == to {
        return x;
    }
    let device = x.device();
    let rows = interpolation(h, to[0], &device).unsqueeze::<3>(); // [1, h', h]
    let columns = interpolation(w, to[1], &device)
        .transpose()
        .unsqueeze::<3>(); // [1, w, w']
    rows.matmul(x).matmul(columns)
}

/// Channel-last images `[b, h, w, c]` to another size.
fn resize_images(x: Tensor<4>, to: [usize; 2]) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let planes = x.permute([0, 3, 1, 2]).reshape([b * c, h, w]);
    resize(planes, to)
        .reshape([b, c, to[0], to[1]])
        .permute([0, 2, 3, 1])
}

/// The matrix `[to, from]` whose rows say how much each old value is part of a new one.
fn interpolation(from: usize, to: usize, device: &Device) -> Tensor<2> {
    let scale = from as f32 / to as f32;
    let mut matrix = vec![0.0; to * from];
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
        let low = (at as usize).min(from - 1);
        let part = at - low as f32;
        row[low] += 1.0 - part;
        row[(low + 1).min(from - 1)] += part;
    }
    Tensor::from_data(TensorData::new(matrix, [to, from]), device)
}
