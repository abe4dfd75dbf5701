//! The parameters of a run: master weights in `f32`, optimiser moments, and the moving average.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::{
    Init, ParameterSource, ParameterSpec, Params, RandomInit, TensorMap, WeightError,
};

/// One parameter of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// Official shape.
    pub shape: Vec<usize>,
    /// False for a buffer.
    pub trainable: bool,
    /// The weight.
    pub value: Vec<f32>,
    /// AdamW's first moment.
    pub first: Vec<f32>,
    /// AdamW's second moment.
    pub second: Vec<f32>,
    /// Exponential moving average of the weight.
    pub ema: Vec<f32>,
}

/// All parameters of a run by official name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParameterStore {
    entries: BTreeMap<String, Entry>,
}

impl ParameterStore {
    /// The parameters that `build` asks for, freshly initialised from `seed`.
    pub fn initialise<E: From<WeightError>>(
        seed: u64,
        build: impl FnOnce(&Params<'_>) -> Result<(), E>,
    ) -> Result<Self, E> {
        Self::from_source(&RandomInit::new(seed), build)
    }

    /// The parameters that `build` asks for, with the values that `source` gives.
    pub fn from_source<E: From<WeightError>>(
        source: &dyn ParameterSource,
        build: impl FnOnce(&Params<'_>) -> Result<(), E>,
    ) -> Result<Self, E> {
        let map = TensorMap::collect(source, &Device::flex(), build)?;
        let mut entries = BTreeMap::new();
        for (spec, tensor) in map.iter() {
            let data = tensor.clone().into_data().try_into_vec::<f32>();
            let value = data.map_err(|e| WeightError::Dtype {
                origin: "initialisation".into(),
                name: spec.name.clone(),
                found: format!("{e:?}"),
            })?;
            let zeros = if spec.trainable {
                vec![0.0; value.len()]
            } else {
                Vec::new()
            };
            let entry = Entry {
                shape: spec.shape.clone(),
                trainable: spec.trainable,
                ema: if spec.trainable {
                    value.clone()
                } else {
                    Vec::new()
                },
                value,
                first: zeros.clone(),
                second: zeros,
            };
            entries.insert(spec.name.clone(), entry);
        }
        Ok(Self { entries })
    }

    /// Parameters read back from a checkpoint.
    pub fn from_entries(entries: BTreeMap<String, Entry>) -> Self {
        Self { entries }
    }

    /// Name and entry of every parameter, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.as_str(), entry))
    }

    /// Name and entry of every trainable parameter, in name order.
    pub fn trainable_mut(&mut self) -> impl Iterator<Item = (&str, &mut Entry)> {
        self.entries
            .iter_mut()
            .filter(|(_, entry)| entry.trainable)
            .map(|(name, entry)| (name.as_str(), entry))
    }

    /// The entry of this name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Number of trainable parameters.
    pub fn trainable_count(&self) -> usize {
        self.iter()
            .filter(|(_, e)| e.trainable)
            .map(|(_, e)| e.value.len())
            .sum()
    }

    /// Adds a buffer, or replaces the one of this name: state of a run that checkpoints carry.
    pub fn set_buffer(&mut self, name: &str, value: Vec<f32>) {
        let entry = Entry {
            shape: vec![value.len()],
            value,
            ..Entry::default()
        };
        self.entries.insert(name.to_owned(), entry);
    }

    /// The parameters whose names do not begin with `prefix`.
    pub fn without(&self, prefix: &str) -> Self {
        let others = self.entries.iter().filter(|(n, _)| !n.starts_with(prefix));
        Self {
            entries: others.map(|(n, e)| (n.clone(), e.clone())).collect(),
        }
    }

    /// Adds the parameters of another store.
    pub fn extend(&mut self, other: Self) {
        self.entries.extend(other.entries);
    }

    /// The weights as leaves of Burn's autodiff graph, for one training step.
    pub fn tracked(&self) -> TensorMap {
        self.tracked_where(|_| true)
    }

    /// The weights, those that `train` names as leaves of the graph and all others as constants of it.
    pub fn tracked_where(&self, train: impl Fn(&str) -> bool) -> TensorMap {
        let device = Device::flex().autodiff();
        self.tensors(|name, entry| {
            let tensor = from_slice(&entry.value, &device);
            if entry.trainable && train(name) {
                tensor.require_grad()
            } else {
                tensor
            }
        })
    }

    /// The moving average of the weights, for sampling and export.
    pub fn averaged(&self) -> TensorMap {
        let device = Device::flex();
        self.tensors(|_, entry| from_slice(entry.averaged(), &device))
    }

    /// The weights themselves, for use without gradients.
    pub fn current(&self) -> TensorMap {
        let device = Device::flex();
        self.tensors(|_, entry| from_slice(&entry.value, &device))
    }

    fn tensors(&self, make: impl Fn(&str, &Entry) -> Tensor<1>) -> TensorMap {
        let mut map = TensorMap::default();
        for (name, entry) in &self.entries {
            let spec = ParameterSpec {
                name: name.clone(),
                shape: entry.shape.clone(),
                init: Init::Zeros,
                trainable: entry.trainable,
            };
            map.insert(spec, make(name, entry));
        }
        map
    }
}

impl Entry {
    /// The moving average, or a buffer's value.
    pub fn averaged(&self) -> &[f32] {
        if self.trainable {
            &self.ema
        } else {
            &self.value
        }
    }
}

fn from_slice(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_starts_with_what_the_model_asks_for() {
        let store = ParameterStore::initialise::<WeightError>(7, |p| {
            p.sub("a").tensor("weight", [3, 2], Init::Uniform(0.5))?;
            p.tensor("bias", [4], Init::Ones)?;
            Ok(())
        })
        .unwrap();
        let weight = store.get("a.weight").unwrap();
        assert_eq!(weight.shape, [3, 2]);
        assert!(weight.value.iter().all(|x| x.abs() <= 0.5));
        assert!(weight.value.iter().any(|x| *x != weight.value[0]));
        assert_eq!(store.get("bias").unwrap().value, [1.0; 4]);
        assert_eq!(weight.ema, weight.value);
        assert_eq!(store.trainable_count(), 10);
    }
}
