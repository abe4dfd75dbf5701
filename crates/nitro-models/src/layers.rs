//! Layers shared by the models, under PyTorch's names and shapes.

use burn::tensor::{Device, Tensor};
use nitro_ops::{Activation, ConvGeometry, Precision, activate, conv2d, linear, rms_norm};

use crate::{Init, LowRank, Params, WeightError};

/// `torch.nn.Linear`: `weight [out, in]`, `bias [out]`, and the low-rank updates beside the weight.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    adapters: Vec<LowRank>,
    precision: Precision,
}

impl Linear {
    /// With a bias.
    pub fn new(p: &Params<'_>, inputs: usize, outputs: usize) -> Result<Self, WeightError> {
        let bias = p.tensor("bias", [outputs], fan_in_init(inputs))?;
        Ok(Self {
            bias: Some(bias),
            ..Self::without_bias(p, inputs, outputs)?
        })
    }

    /// Without a bias.
    pub fn without_bias(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, WeightError> {
        let weight = p.tensor("weight", [outputs, inputs], fan_in_init(inputs))?;
        Ok(Self {
            weight,
            bias: None,
            adapters: p.low_rank("weight"),
            precision: p.precision(),
        })
    }

    /// A 1x1 `torch.nn.Conv2d`, weight `[out, in, 1, 1]`: over channel-last images, a linear layer.
    pub fn pointwise(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Self, WeightError> {
        let init = fan_in_init(inputs);
        let weight = p.tensor("weight", [outputs, inputs, 1, 1], init)?;
        let bias = bias
            .then(|| p.tensor("bias", [outputs], init))
            .transpose()?;
        Ok(Self {
            weight: weight.reshape([outputs, inputs]),
            bias,
            adapters: Vec::new(),
            precision: p.precision(),
        })
    }

    /// A `torch.nn.Conv2d` whose stride is its kernel size, weight `[out, in, patch, patch]`: over
    /// images whose patches were moved to channels (`pixel_unshuffle`), a linear layer.
    pub fn patches(
        p: &Params<'_>,
        inputs: usize,
        outputs: usize,
        patch: usize,
    ) -> Result<Self, WeightError> {
        let fan_in = inputs * patch * patch;
        let init = fan_in_init(fan_in);
        let weight = p.tensor("weight", [outputs, inputs, patch, patch], init)?;
        let bias = Some(p.tensor("bias", [outputs], init)?);
        Ok(Self {
            weight: weight.reshape([outputs, fan_in]),
            bias,
            adapters: Vec::new(),
            precision: p.precision(),
        })
    }

    /// Several layers without bias over the same input as one product: their outputs, `outputs`
    /// each, lie one after the other.
    pub fn stacked(
        p: &Params<'_>,
        names: &[&str],
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, WeightError> {
        let weights = names.iter().map(|name| {
            p.sub(name)
                .tensor::<2>("weight", [outputs, inputs], fan_in_init(inputs))
        });
        let weight = Tensor::cat(weights.collect::<Result<Vec<_>, _>>()?, 0);
        Ok(Self {
            weight,
            bias: None,
            adapters: Vec::new(),
            precision: p.precision(),
        })
    }

    /// The layer of some of the outputs.
    pub fn rows(&self, outputs: std::ops::Range<usize>) -> Self {
        let bias = self.bias.clone();
        let adapters = self.adapters.iter().map(|adapter| LowRank {
            up: adapter.up.clone().slice_dim(0, outputs.clone()),
            ..adapter.clone()
        });
        Self {
            weight: self.weight.clone().slice_dim(0, outputs.clone()),
            adapters: adapters.collect(),
            bias: bias.map(|bias| bias.slice_dim(0, outputs)),
            precision: self.precision,
        }
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.weight.device()
    }

    /// `x [.., in] -> [.., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_with(x, Activation::None)
    }

    /// `activation(linear(x))` in one pass.
    pub fn forward_with<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        let bias = self.bias.as_ref();
        if self.adapters.is_empty() {
            return linear(x, &self.weight, bias, activation, self.precision);
        }
        let product = |x, weight, bias| linear(x, weight, bias, Activation::None, self.precision);
        let y = product(x.clone(), &self.weight, bias);
        let y = self.adapters.iter().fold(y, |y, adapter| {
            let low = product(x.clone(), &adapter.down, None); // [.., rank]
            y + product(low, &adapter.up, None) * adapter.scale
        });
        activate(activation, y)
    }
}

/// `torch.nn.Conv2d` over channel-last images: `weight [out, in / groups, k, k]`, `bias [out]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    geometry: ConvGeometry,
    precision: Precision,
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

impl Conv2d {
    /// The convolution that `spec` describes.
    pub fn new(p: &Params<'_>, spec: ConvSpec) -> Result<Self, WeightError> {
        let ConvSpec {
            inputs,
            outputs,
            kernel,
            stride,
            groups,
            bias,
        } = spec;
        let per_group = inputs / groups;
        let init = fan_in_init(per_group * kernel * kernel);
        Ok(Self {
            weight: p.tensor("weight", [outputs, per_group, kernel, kernel], init)?,
            bias: bias
                .then(|| p.tensor("bias", [outputs], init))
                .transpose()?,
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
        conv2d(
            x,
            &self.weight,
            self.bias.as_ref(),
            self.geometry,
            activation,
            self.precision,
        )
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

    /// Normalises each run of `width` channels of the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, &self.weight, self.bias.as_ref(), self.eps)
    }
}

/// PyTorch's default initialisation of linear layers and convolutions.
fn fan_in_init(fan_in: usize) -> Init {
    Init::Uniform((fan_in as f64).powf(-0.5))
}
