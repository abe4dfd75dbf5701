//! Tensors at hand as a source of parameters.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use nitro_ops::Precision;

use crate::{ParameterSource, ParameterSpec, Params, WeightError};

/// Flattened tensors by official name, with what a model said about each.
///
/// Rebuilding a model around such a map, its tensors tracked by autodiff, is a training step's way
/// to gradients by official name.
#[derive(Clone, Debug, Default)]
pub struct TensorMap {
    tensors: BTreeMap<String, (ParameterSpec, Tensor<1>)>,
}

impl TensorMap {
    /// Every parameter that `build` asks for, with the values that `source` gives.
    pub fn collect<E>(
        source: &dyn ParameterSource,
        device: &Device,
        build: impl FnOnce(&Params<'_>) -> Result<(), E>,
    ) -> Result<Self, E> {
        let collector = Collector {
            source,
            map: RefCell::default(),
        };
        build(&Params::new(&collector, device, Precision::F32))?;
        Ok(collector.map.into_inner())
    }

    /// The same tensors, each passed through `change`.
    pub fn map(&self, mut change: impl FnMut(&ParameterSpec, Tensor<1>) -> Tensor<1>) -> Self {
        let tensors = self.tensors.iter().map(|(name, (spec, tensor))| {
            (name.clone(), (spec.clone(), change(spec, tensor.clone())))
        });
        Self {
            tensors: tensors.collect(),
        }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor<1>> {
        self.tensors.get(name).map(|(_, tensor)| tensor)
    }

    /// All tensors in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&ParameterSpec, &Tensor<1>)> {
        self.tensors.values().map(|(spec, tensor)| (spec, tensor))
    }

    /// Adds a tensor, or replaces the one of this name.
    pub fn insert(&mut self, spec: ParameterSpec, tensor: Tensor<1>) {
        self.tensors.insert(spec.name.clone(), (spec, tensor));
    }
}

impl ParameterSource for TensorMap {
    fn parameter(&self, spec: &ParameterSpec, _: &Device) -> Result<Tensor<1>, WeightError> {
        let origin = || "the tensors at hand".to_owned();
        let (held, tensor) = self
            .tensors
            .get(&spec.name)
            .ok_or_else(|| WeightError::Missing {
                origin: origin(),
                name: spec.name.clone(),
                expected: spec.shape.clone(),
            })?;
        if held.shape != spec.shape {
            return Err(WeightError::Shape {
                origin: origin(),
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: held.shape.clone(),
            });
        }
        Ok(tensor.clone())
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

/// Passes a source's parameters on and keeps them.
struct Collector<'a> {
    source: &'a dyn ParameterSource,
    map: RefCell<TensorMap>,
}

impl ParameterSource for Collector<'_> {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let tensor = self.source.parameter(spec, device)?;
        self.map.borrow_mut().insert(spec.clone(), tensor.clone());
        Ok(tensor)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }
}
