//! Layers shared by the models, under PyTorch's names and shapes.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use nitro_ops::{
    Activation, ConvGeometry, PackedConv2d, PackedLinear, Precision, Rows, activate, conv2d,
    conv2d_packed, layer_norm_modulate, linear, linear_packed, rms_norm,
};

use crate::{Elements, Init, LowRank, Params, WeightError};

/// `torch.nn.Linear`: `weight [out, in]`, `bias [out]`, and the low-rank updates beside the weight.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    adapters: Vec<LowRank>,
    precision: Precision,
    device: Device,
}

/// A linear layer's weight and bias.
#[derive(Clone, Debug)]
enum Weight {
    /// For training, and for every device: `[out, in]` and `[out]`.
    Plain(Box<(Tensor<2>, Option<Tensor<1>>)>),
    /// For inference on the CPU.
    Packed(Arc<PackedLinear>),
}

impl Linear {
    /// With a bias.
    pub fn new(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Self, WeightError> {
        Self::build(std::slice::from_ref(p), &[outputs], &[inputs], true)
    }

    /// Without a bias.
    pub fn without_bias(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, WeightError> {
        Self::build(std::slice::from_ref(p), &[outputs], &[inputs], false)
    }

    /// A 1x1 `torch.nn.Conv2d`, weight `[out, in, 1, 1]`: over channel-last images, a linear layer.
    pub fn pointwise(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Self, WeightError> {
        Self::build(std::slice::from_ref(p), &[outputs], &[inputs, 1, 1], bias)
    }

    /// A `torch.nn.Conv2d` whose stride is its kernel size, weight `[out, in, patch, patch]`: over
    /// images whose patches were moved to channels (`pixel_unshuffle`), a linear layer.
    pub fn patches(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        patch: usize,
    ) -> Result<Self, WeightError> {
        let shape = [inputs, patch, patch];
        Self::build(std::slice::from_ref(p), &[outputs], &shape, true)
    }

    /// As [`Linear::patches`], without a bias.
    pub fn patches_without_bias(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        patch: usize,
    ) -> Result<Self, WeightError> {
        let shape = [inputs, patch, patch];
        Self::build(std::slice::from_ref(p), &[outputs], &shape, false)
    }

    /// A layer of `weight [out, in]` and `bias [out]` that stand under other names.
    pub fn from_tensors(weight: Tensor<2>, bias: Option<Tensor<1>>, precision: Precision) -> Self {
        let device = weight.device();
        Self {
            weight: Weight::Plain(Box::new((weight, bias))),
            adapters: Vec::new(),
            precision,
            device,
        }
    }

    /// Several layers without bias over the same input as one product: their outputs, `outputs`
    /// each, lie one after the other.
    pub fn stacked(
        p: &Params<'_>,
        names: &[&str],
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, WeightError> {
        let parts: Vec<Params<'_>> = names.iter().map(|name| p.sub(name)).collect();
        Self::build(&parts, &vec![outputs; names.len()], &[inputs], false)
    }

    /// The layers at `parts`, of `outputs` each, as one; `shape` is a weight's shape after its
    /// outputs.
    fn build(
        parts: &[Params<'_>],
        outputs: &[usize],
        shape: &[usize],
        bias: bool,
    ) -> Result<Self, WeightError> {
        let inputs: usize = shape.iter().product();
        let init = fan_in_init(inputs);
        let parts: Vec<(&Params<'_>, usize)> = parts.iter().zip(outputs.iter().copied()).collect();
        let first = parts[0].0;
        let full = |outputs: usize| [&[outputs], shape].concat();
        // A single layer may have updates beside its weight, which then stays plain.
        let adapters = match parts.as_slice() {
            [(p, _)] => p.low_rank("weight"),
            _ => Vec::new(),
        };
        let weight = if first.packs() && adapters.is_empty() {
            let packed = pack_linear(&parts, shape, bias)?;
            Weight::Packed(Arc::new(packed))
        } else {
            let weights = parts.iter().map(|(p, outputs)| {
                let flat = p.flat("weight", &full(*outputs), init)?;
                Ok(flat.reshape([*outputs, inputs]))
            });
            let weights = weights.collect::<Result<Vec<Tensor<2>>, WeightError>>()?;
            let biases = parts
                .iter()
                .filter(|_| bias)
                .map(|(p, outputs)| p.tensor("bias", [*outputs], init));
            let biases = biases.collect::<Result<Vec<Tensor<1>>, _>>()?;
            Weight::Plain(Box::new((joined(weights), bias.then(|| joined(biases)))))
        };
        Ok(Self {
            weight,
            adapters,
            precision: first.precision(),
            device: first.device().clone(),
        })
    }

    /// The outputs for `x [b, t, in]` in `N` equal parts: those of a fused `qkv` layer, for example.
    pub fn forward_split<const N: usize>(&self, x: &Tensor<3>) -> [Tensor<3>; N] {
        match &self.weight {
            // As many layers: their outputs need not be copied apart.
            Weight::Plain(plain) if self.adapters.is_empty() => {
                let (weight, bias) = &**plain;
                let width = weight.dims()[0] / N;
                std::array::from_fn(|i| {
                    let rows = i * width..(i + 1) * width;
                    let weight = weight.clone().slice_dim(0, rows.clone());
                    let bias = bias.clone().map(|bias| bias.slice_dim(0, rows));
                    let activation = Activation::None;
                    linear(
                        x.clone(),
                        &weight,
                        bias.as_ref(),
                        activation,
                        self.precision,
                    )
                })
            }
            _ => {
                let y = self.forward(x.clone());
                let width = y.dims()[2] / N;
                cut(y, [width; N])
            }
        }
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// The packed weights of a model for inference.
    pub fn packed(&self) -> Option<&PackedLinear> {
        match &self.weight {
            Weight::Packed(packed) => Some(packed),
            Weight::Plain(..) => None,
        }
    }

    /// `x [.., in] -> [.., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_with(x, Activation::None)
    }

    /// `activation(linear(x))` in one pass.
    pub fn forward_with<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        let (weight, bias) = match &self.weight {
            Weight::Plain(plain) => (&plain.0, plain.1.as_ref()),
            Weight::Packed(packed) => return linear_packed(x, packed, activation),
        };
        if self.adapters.is_empty() {
            return linear(x, weight, bias, activation, self.precision);
        }
        let product = |x, weight, bias| linear(x, weight, bias, Activation::None, self.precision);
        let y = product(x.clone(), weight, bias);
        let y = self.adapters.iter().fold(y, |y, adapter| {
            let low = product(x.clone(), &adapter.down, None); // [.., rank]
            y + product(low, &adapter.up, None) * adapter.scale
        });
        activate(activation, y)
    }
}

/// The channels of `y` in parts of these widths.
fn cut<const N: usize>(y: Tensor<3>, widths: [usize; N]) -> [Tensor<3>; N] {
    let mut at = 0;
    widths.map(|width| {
        at += width;
        y.clone().slice_dim(2, at - width..at)
    })
}

/// The tensors one after the other; a single one as it is.
fn joined<const D: usize>(mut tensors: Vec<Tensor<D>>) -> Tensor<D> {
    match tensors.len() {
        1 => tensors.remove(0),
        _ => Tensor::cat(tensors, 0),
    }
}

/// The weights of the layers at `parts`, of so many outputs each, as one packed layer; `shape` is a
/// weight's shape after its outputs.
pub(crate) fn pack_linear(
    parts: &[(&Params<'_>, usize)],
    shape: &[usize],
    bias: bool,
) -> Result<PackedLinear, WeightError> {
    let inputs: usize = shape.iter().product();
    let init = fan_in_init(inputs);
    let (first, precision) = (parts[0].0, parts[0].0.precision());
    let outputs: usize = parts.iter().map(|(_, outputs)| outputs).sum();
    let full = |outputs: usize| [&[outputs], shape].concat();
    let biases = || -> Result<Option<Vec<f32>>, WeightError> {
        let mut biases = Vec::new();
        for (p, outputs) in parts.iter().filter(|_| bias) {
            biases.extend(p.values("bias", &[*outputs], init)?);
        }
        Ok(bias.then_some(biases))
    };
    let misshapen = |error| first.misshapen("weight", &error);

    let names: Vec<String> = parts.iter().map(|(p, _)| p.name("weight")).collect();
    let name = names.join("+");
    let form = PackedLinear::form([outputs, inputs], precision);
    if let Some(bytes) = first.kept(&name, &form) {
        for (p, outputs) in parts {
            p.verify("weight", &full(*outputs), init)?;
        }
        return PackedLinear::from_packed([outputs, inputs], biases()?, precision, bytes)
            .map_err(misshapen);
    }
    let elements = parts
        .iter()
        .map(|(p, outputs)| p.elements("weight", &full(*outputs), init));
    let elements = elements.collect::<Result<Vec<_>, _>>()?;
    let rows = elements
        .iter()
        .zip(parts)
        .map(|(elements, (_, outputs))| match elements {
            Elements::Stored(bytes, element) => Rows::new(bytes, *element, *outputs, inputs),
            Elements::Values(values) => Rows::from_f32(values, *outputs, inputs),
        });
    let biases = biases()?;
    let packed = rows
        .collect::<Result<Vec<_>, _>>()
        .and_then(|rows| PackedLinear::new(&rows, biases, precision))
        .map_err(misshapen)?;
    first.keep(&name, &form, packed.packed());
    Ok(packed)
}

/// `N` linear layers over the same input: apart for training, one product for inference.
#[derive(Clone, Debug)]
pub enum Fan<const N: usize> {
    /// A layer each.
    Apart(Box<[Linear; N]>),
    /// One layer, whose outputs are cut into these widths.
    Stacked(Box<Linear>, [usize; N]),
}

impl<const N: usize> Fan<N> {
    /// The layers at `parts`, of `outputs` each.
    pub fn new(
        parts: [Params<'_>; N],
        inputs: usize,
        outputs: [usize; N],
        bias: bool,
    ) -> Result<Self, WeightError> {
        let stacks = |p: &Params<'_>| p.packs() && p.low_rank("weight").is_empty();
        if parts.iter().all(stacks) {
            let stacked = Linear::build(&parts, &outputs, &[inputs], bias)?;
            return Ok(Self::Stacked(Box::new(stacked), outputs));
        }
        let mut layers = Vec::with_capacity(N);
        for (part, outputs) in parts.iter().zip(outputs) {
            let part = std::slice::from_ref(part);
            layers.push(Linear::build(part, &[outputs], &[inputs], bias)?);
        }
        match <Box<[Linear; N]>>::try_from(layers.into_boxed_slice()) {
            Ok(layers) => Ok(Self::Apart(layers)),
            Err(_) => unreachable!("one layer was made for each of N parts"),
        }
    }

    /// The output of each layer, `x [b, t, in] -> [b, t, out]`.
    pub fn forward(&self, x: &Tensor<3>) -> [Tensor<3>; N] {
        match self {
            Self::Apart(layers) => layers.each_ref().map(|layer| layer.forward(x.clone())),
            Self::Stacked(layer, widths) => cut(layer.forward(x.clone()), *widths),
        }
    }

    /// The packed weights of all layers.
    pub fn packed(&self) -> Option<&PackedLinear> {
        match self {
            Self::Stacked(layer, _) => layer.packed(),
            Self::Apart(_) => None,
        }
    }
}

/// `torch.nn.Conv2d` over channel-last images: `weight [out, in / groups, k, k]`, `bias [out]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: ConvWeight,
    geometry: ConvGeometry,
    precision: Precision,
}

/// A convolution's weight and bias.
#[derive(Clone, Debug)]
enum ConvWeight {
    /// For training, and for every device.
    Plain(Box<(Tensor<4>, Option<Tensor<1>>)>),
    /// For inference on the CPU.
    Packed(Arc<PackedConv2d>, Option<Arc<[f32]>>),
}

/// The static part of a [`Conv2d`].
#[derive(Clone, Copy, Debug)]
pub struct ConvSpec {
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Kernel size; padding is `kernel / 2`.
    pub kernel: usize,
    /// Step in both directions.
    pub stride: usize,
    /// Channel groups.
    pub groups: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

impl ConvSpec {
    /// A dense convolution of stride 1 with a bias.
    pub fn new(inputs: usize, outputs: usize, kernel: usize) -> Self {
        Self {
            inputs,
            outputs,
            kernel,
            stride: 1,
            groups: 1,
            bias: true,
        }
    }
}

impl ConvSpec {
    fn weight_shape(&self) -> [usize; 4] {
        let Self {
            inputs,
            outputs,
            kernel,
            groups,
            ..
        } = *self;
        [outputs, inputs / groups, kernel, kernel]
    }

    pub(crate) fn init(&self) -> Init {
        let [_, inputs, height, width] = self.weight_shape();
        fan_in_init(inputs * height * width)
    }

    /// The convolution's weights and bias, packed.
    pub(crate) fn pack(
        &self,
        p: &Params<'_>,
    ) -> Result<(PackedConv2d, Option<Vec<f32>>), WeightError> {
        let weight = p.values("weight", &self.weight_shape(), self.init())?;
        let bias = self
            .bias
            .then(|| p.values("bias", &[self.outputs], self.init()));
        let conv = nitro_ops::Conv2d {
            batch: 1,
            height: 0,
            width: 0,
            in_channels: self.inputs,
            out_channels: self.outputs,
            kernel: [self.kernel; 2],
            stride: self.stride,
            padding: self.kernel / 2,
            groups: self.groups,
        };
        let packed = PackedConv2d::new(&conv, &weight, p.precision())
            .map_err(|error| p.misshapen("weight", &error))?;
        Ok((packed, bias.transpose()?))
    }
}

impl Conv2d {
    /// The convolution that `spec` describes.
    pub fn new(p: &Params<'_>, spec: ConvSpec) -> Result<Self, WeightError> {
        let ConvSpec {
            outputs,
            kernel,
            stride,
            groups,
            bias,
            ..
        } = spec;
        let weight = if p.packs() {
            let (packed, bias) = spec.pack(p)?;
            ConvWeight::Packed(Arc::new(packed), bias.map(Arc::from))
        } else {
            let weight = p.tensor("weight", spec.weight_shape(), spec.init())?;
            let bias = bias.then(|| p.tensor("bias", [outputs], spec.init()));
            ConvWeight::Plain(Box::new((weight, bias.transpose()?)))
        };
        Ok(Self {
            weight,
            geometry: ConvGeometry {
                stride,
                padding: kernel / 2,
                groups,
            },
            precision: p.precision(),
        })
    }

    /// `x [batch, height, width, in] -> [batch, height', width', out]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.forward_with(x, Activation::None)
    }

    /// `activation(conv(x))` in one pass.
    pub fn forward_with(&self, x: Tensor<4>, activation: Activation) -> Tensor<4> {
        match &self.weight {
            ConvWeight::Plain(plain) => {
                let (weight, bias) = &**plain;
                let (geometry, precision) = (self.geometry, self.precision);
                conv2d(x, weight, bias.as_ref(), geometry, activation, precision)
            }
            ConvWeight::Packed(weight, bias) => {
                conv2d_packed(x, weight, bias.as_deref(), activation)
            }
        }
    }
}

/// RMS norm over the last dimension, with an optional bias (DC-AE has one).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
}

impl RmsNorm {
    /// `weight [width]` alone.
    pub fn new(p: &Params<'_>, width: usize, eps: f64) -> Result<Self, WeightError> {
        Ok(Self {
            weight: p.tensor("weight", [width], Init::Ones)?,
            bias: None,
            eps,
        })
    }

    /// `weight [width]` and `bias [width]`.
    pub fn with_bias(p: &Params<'_>, width: usize, eps: f64) -> Result<Self, WeightError> {
        let bias = p.tensor("bias", [width], Init::Zeros)?;
        Ok(Self {
            bias: Some(bias),
            ..Self::new(p, width, eps)?
        })
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// `weight [width]`.
    pub fn weight(&self) -> &Tensor<1> {
        &self.weight
    }

    /// Normalises each run of `width` channels of the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, &self.weight, self.bias.as_ref(), self.eps)
    }
}

/// `torch.nn.LayerNorm` over the last dimension: `weight [width]`, `bias [width]`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
}

impl LayerNorm {
    /// The norm at `p`.
    pub fn new(p: &Params<'_>, width: usize, eps: f64) -> Result<Self, WeightError> {
        Ok(Self {
            weight: p.tensor("weight", [width], Init::Ones)?,
            bias: p.tensor("bias", [width], Init::Zeros)?,
            eps,
        })
    }

    /// `x [.., width] -> [.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dims = x.dims();
        let rows = dims[..D - 1].iter().product();
        let x = x.reshape([1, rows, dims[D - 1]]);
        layer_norm_modulate(x, Some((&self.weight, &self.bias)), None, self.eps).reshape(dims)
    }
}

/// PyTorch's default initialisation of linear layers and convolutions.
fn fan_in_init(fan_in: usize) -> Init {
    Init::Uniform((fan_in as f64).powf(-0.5))
}
