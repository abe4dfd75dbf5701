//! How a model gets its parameters: by official name, shape and initialisation, from any source.
//!
//! A model's constructor asks a [`Params`] for each tensor under its official state-dict name. The
//! same constructor therefore reads checkpoints, draws a fresh initialisation, rebuilds a model
//! around the tensors of a training step, and lists what a checkpoint must hold.

use std::fmt;

use burn::tensor::{Device, Tensor, TensorData};
use nitro_ops::{ElementType, PackedBytes, PackedForm, Precision, Rows, can_pack};

use crate::{PackedFile, StoredTable, WeightError};

/// How a parameter starts when it is not loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// All this value.
    Constant(f64),
    /// Uniform in `-bound..bound`. PyTorch's default for linear layers and convolutions, weight and
    /// bias alike, is a bound of `1 / sqrt(fan_in)`.
    Uniform(f64),
    /// Normal with this standard deviation.
    Normal(f64),
}

/// A parameter that a model asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// Official state-dict name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Initialisation.
    pub init: Init,
    /// False for a buffer (such as `pos_embed.pos_embed`): stored in checkpoints, never trained.
    pub trainable: bool,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Something that gives a model its parameters.
pub trait ParameterSource {
    /// The parameter, flattened in row-major order, on `device`.
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError>;

    /// Whether the source holds a tensor of this name.
    ///
    /// Sources that make parameters up hold none that are optional.
    fn contains(&self, name: &str) -> bool;

    /// Low-rank updates that a linear layer applies beside its weight `name` (see
    /// [`Adapted`](crate::Adapted)); most sources have none.
    fn low_rank(&self, _name: &str) -> Vec<LowRank> {
        Vec::new()
    }

    /// The parameter's elements as the source holds them, for packing without a copy in between.
    fn elements(&self, spec: &ParameterSpec) -> Result<Elements<'_>, WeightError> {
        let tensor = self.parameter(spec, &Device::flex())?;
        let values = tensor.into_data().try_into_vec::<f32>();
        values
            .map(Elements::Values)
            .map_err(|error| WeightError::Dtype {
                origin: "the parameter source".to_owned(),
                name: spec.name.clone(),
                found: format!("{error:?}"),
            })
    }

    /// Whether the parameter can be had, for one whose packed form is at hand already. Sources that can
    /// tell without making the elements do.
    fn verify(&self, spec: &ParameterSpec) -> Result<(), WeightError> {
        self.elements(spec).map(drop)
    }

    /// A matrix that stays where the source has it, to be read by rows; `None` where the source
    /// cannot keep it for that long.
    fn table(&self, _: &ParameterSpec) -> Result<Option<StoredTable>, WeightError> {
        Ok(None)
    }
}

/// The elements of a parameter in row-major order.
#[derive(Clone, Debug)]
pub enum Elements<'a> {
    /// As in a file.
    Stored(&'a [u8], ElementType),
    /// Made for the purpose.
    Values(Vec<f32>),
}

/// A low-rank update of a linear layer that is not merged into its weight: the layer gives
/// `W x + scale up (down x)`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// LoRA's A, `[rank, in]`.
    pub down: Tensor<2>,
    /// LoRA's B, `[out, rank]`.
    pub up: Tensor<2>,
    /// Strength: `alpha / rank`, times what the user asks for.
    pub scale: f64,
}

/// A position in the tree of names over a [`ParameterSource`].
#[derive(Clone)]
pub struct Params<'a> {
    source: &'a dyn ParameterSource,
    prefix: String,
    device: Device,
    precision: Precision,
    packs: bool,
    kept: Option<&'a PackedFile>,
}

impl fmt::Debug for Params<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Params")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl<'a> Params<'a> {
    /// The root of `source`; tensors are put on `device`, products computed in `precision`.
    pub fn new(source: &'a dyn ParameterSource, device: &Device, precision: Precision) -> Self {
        Self {
            source,
            prefix: String::new(),
            device: device.clone(),
            precision,
            packs: false,
            kept: None,
        }
    }

    /// The same position, for a model that will only be run: on the CPU, the weights of its linear
    /// layers are packed once, straight from the source, and kept in that form alone.
    pub fn for_inference(&self) -> Self {
        Self {
            packs: can_pack(&self.device),
            ..self.clone()
        }
    }

    /// The same position; what is packed comes from `file`, if there is one, where it holds it, and is
    /// kept for it where it does not.
    pub fn with_packed(&self, file: Option<&'a PackedFile>) -> Self {
        Self {
            kept: file,
            ..self.clone()
        }
    }

    /// Whether linear layers keep packed weights.
    pub fn packs(&self) -> bool {
        self.packs
    }

    /// The same position for layers that few products pass through and much depends on: never in
    /// integers.
    pub fn sensitive(&self) -> Self {
        match self.precision {
            Precision::Int8 => self.with_precision(Precision::Bf16),
            Precision::F32 | Precision::Bf16 => self.clone(),
        }
    }

    /// The subtree `name`.
    pub fn sub(&self, name: impl fmt::Display) -> Self {
        Self {
            prefix: self.name(name),
            ..self.clone()
        }
    }

    /// The same position, with products in another precision.
    pub fn with_precision(&self, precision: Precision) -> Self {
        Self {
            precision,
            ..self.clone()
        }
    }

    /// The full official name of `leaf`.
    pub fn name(&self, leaf: impl fmt::Display) -> String {
        match self.prefix.as_str() {
            "" => leaf.to_string(),
            prefix => format!("{prefix}.{leaf}"),
        }
    }

    /// The device parameters are put on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How products with these parameters are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether the source holds `leaf`.
    pub fn contains(&self, leaf: impl fmt::Display) -> bool {
        self.source.contains(&self.name(leaf))
    }

    /// The low-rank updates beside the weight `leaf`.
    pub fn low_rank(&self, leaf: impl fmt::Display) -> Vec<LowRank> {
        self.source.low_rank(&self.name(leaf))
    }

    /// The trainable parameter `leaf`.
    pub fn tensor<const D: usize>(
        &self,
        leaf: &str,
        shape: [usize; D],
        init: Init,
    ) -> Result<Tensor<D>, WeightError> {
        self.get(leaf, shape, init, true)
    }

    /// The trainable parameter `leaf` without dimensions, as a tensor of one element.
    pub fn scalar(&self, leaf: &str, init: Init) -> Result<Tensor<1>, WeightError> {
        let spec = ParameterSpec {
            name: self.name(leaf),
            shape: Vec::new(),
            init,
            trainable: true,
        };
        self.source.parameter(&spec, &self.device)
    }

    /// The buffer `leaf`: read from a checkpoint that has it, else `default()`.
    pub fn buffer<const D: usize>(
        &self,
        leaf: &str,
        shape: [usize; D],
        default: impl FnOnce() -> Vec<f32>,
    ) -> Result<Tensor<D>, WeightError> {
        if self.contains(leaf) {
            self.get(leaf, shape, Init::Zeros, false)
        } else {
            Ok(Tensor::from_data(
                TensorData::new(default(), shape),
                &self.device,
            ))
        }
    }

    /// The trainable parameter `leaf` of any shape, flattened.
    pub(crate) fn flat(
        &self,
        leaf: &str,
        shape: &[usize],
        init: Init,
    ) -> Result<Tensor<1>, WeightError> {
        let spec = self.spec(leaf, shape, init, true);
        self.source.parameter(&spec, &self.device)
    }

    /// The elements of the trainable parameter `leaf`, for packing.
    pub(crate) fn elements(
        &self,
        leaf: &str,
        shape: &[usize],
        init: Init,
    ) -> Result<Elements<'a>, WeightError> {
        self.source.elements(&self.spec(leaf, shape, init, true))
    }

    /// The values of the trainable parameter `leaf`, for packing.
    pub(crate) fn values(
        &self,
        leaf: &str,
        shape: &[usize],
        init: Init,
    ) -> Result<Vec<f32>, WeightError> {
        match self.elements(leaf, shape, init)? {
            Elements::Values(values) => Ok(values),
            Elements::Stored(bytes, element) => {
                let mut values = vec![0.0; shape.iter().product()];
                Rows::new(bytes, element, 1, values.len())
                    .map_err(|error| self.misshapen(leaf, &error))?
                    .read(0, &mut values);
                Ok(values)
            }
        }
    }

    /// The parameters `name` (one or more) in packed form, if a file holds them.
    pub(crate) fn kept(&self, name: &str, form: &PackedForm) -> Option<PackedBytes> {
        self.kept?.get(name, form)
    }

    /// Keeps what was packed for a file, if there is one.
    pub(crate) fn keep(&self, name: &str, form: &PackedForm, bytes: &PackedBytes) {
        if let Some(file) = self.kept {
            file.put(name, form, bytes);
        }
    }

    /// Fails as [`Params::elements`] would, for a parameter whose packed form was kept.
    pub(crate) fn verify(
        &self,
        leaf: &str,
        shape: &[usize],
        init: Init,
    ) -> Result<(), WeightError> {
        self.source.verify(&self.spec(leaf, shape, init, true))
    }

    /// Elements of `leaf` that are not as long as their shape: the source contradicts itself.
    pub(crate) fn misshapen(&self, leaf: &str, error: &dyn fmt::Display) -> WeightError {
        WeightError::Config {
            origin: self.name(leaf),
            reason: error.to_string(),
        }
    }

    /// The matrix `leaf` where the source has it, if it can stay there.
    pub(crate) fn table(
        &self,
        leaf: &str,
        shape: [usize; 2],
    ) -> Result<Option<StoredTable>, WeightError> {
        self.source
            .table(&self.spec(leaf, &shape, Init::Zeros, true))
    }

    fn get<const D: usize>(
        &self,
        leaf: &str,
        shape: [usize; D],
        init: Init,
        trainable: bool,
    ) -> Result<Tensor<D>, WeightError> {
        let spec = self.spec(leaf, &shape, init, trainable);
        Ok(self.source.parameter(&spec, &self.device)?.reshape(shape))
    }

    fn spec(&self, leaf: &str, shape: &[usize], init: Init, trainable: bool) -> ParameterSpec {
        ParameterSpec {
            name: self.name(leaf),
            shape: shape.to_vec(),
            init,
            trainable,
        }
    }
}
