//! Adapters beside the weights: the low-rank path is computed, and trained, on its own.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};

use super::LoraAdapter;
use crate::{LowRank, ParameterSource, ParameterSpec, WeightError};

/// The low-rank updates of some linear layers, as tensors: frozen ones of a file, or the leaves of a
/// training step.
#[derive(Clone, Debug, Default)]
pub struct LiveAdapter {
    origin: String,
    layers: BTreeMap<String, LowRank>,
}

impl LiveAdapter {
    /// An adapter without layers; `origin` is what messages call it.
    pub fn new(origin: impl Into<String>) -> Self {
        Self {
            origin: origin.into(),
            layers: BTreeMap::new(),
        }
    }

    /// The adapter of a file, on `device`.
    pub fn load(adapter: &LoraAdapter, device: &Device) -> Self {
        let mut live = Self::new(&adapter.origin);
        for (name, update) in &adapter.updates {
            let [out, inner] = update.shape();
            let matrix = |values: &[f32], shape: [usize; 2]| {
                Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device)
            };
            let (down, up) = (
                matrix(&update.down, [update.rank, inner]),
                matrix(&update.up, [out, update.rank]),
            );
            // Stored for a transposed weight, the two change places.
            let (down, up) = match update.transposed {
                false => (down, up),
                true => (up.transpose(), down.transpose()),
            };
            let low_rank = LowRank {
                down,
                up,
                scale: update.scale,
            };
            live.layers.insert(name.clone(), low_rank);
        }
        live
    }

    /// Adds the update of the layer `module` (its name without `.weight`).
    pub fn insert(&mut self, module: &str, update: LowRank) {
        self.layers.insert(format!("{module}.weight"), update);
    }
}

/// A source of parameters whose linear layers apply adapters beside their weights.
///
/// With [`Merged`](super::Merged) the same adapters cost nothing at run time; here the weights stay
/// as they are, so that adapters can be trained, weighted and switched off.
pub struct Adapted<'a> {
    base: &'a dyn ParameterSource,
    adapters: Vec<(&'a LiveAdapter, f64)>,
}

impl std::fmt::Debug for Adapted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapted")
            .field("adapters", &self.adapters.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Adapted<'a> {
    /// `base` with each adapter at its strength (1 is as trained).
    ///
    /// # Errors
    /// When an adapter changes a weight that `base` does not have.
    pub fn new(
        base: &'a dyn ParameterSource,
        adapters: impl IntoIterator<Item = (&'a LiveAdapter, f64)>,
    ) -> Result<Self, WeightError> {
        let adapters: Vec<_> = adapters.into_iter().collect();
        for (adapter, _) in &adapters {
            let names = adapter.layers.keys().filter(|name| !base.contains(name));
            let names: Vec<String> = names.cloned().collect();
            if !names.is_empty() {
                let origin = adapter.origin.clone();
                return Err(WeightError::Unexpected { origin, names });
            }
        }
        Ok(Self { base, adapters })
    }
}

impl ParameterSource for Adapted<'_> {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        for (adapter, _) in &self.adapters {
            let Some(update) = adapter.layers.get(&spec.name) else {
                continue;
            };
            let found = [update.up.dims()[0], update.down.dims()[1]];
            if spec.shape != found {
                return Err(WeightError::Shape {
                    origin: format!("{} (for linear layers only)", adapter.origin),
                    name: spec.name.clone(),
                    expected: spec.shape.clone(),
                    found: found.to_vec(),
                });
            }
        }
        self.base.parameter(spec, device)
    }

    fn contains(&self, name: &str) -> bool {
        self.base.contains(name)
    }

    fn low_rank(&self, name: &str) -> Vec<LowRank> {
        let own = self.adapters.iter().filter_map(|(adapter, strength)| {
            let update = adapter.layers.get(name)?;
            let scale = update.scale * strength;
            // Switched off, an adapter is not there, to the bit.
            (scale != 0.0).then(|| LowRank {
                scale,
                ..update.clone()
            })
        });
        self.base.low_rank(name).into_iter().chain(own).collect()
    }
}
