//! LoRA adapters: PEFT folders read and written, merged into the weights as they are read
//! ([`Merged`]) or applied beside them ([`Adapted`]).

mod live;
mod save;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use serde::Deserialize;
use serde_json::{Map, Value};

pub use self::live::{Adapted, LiveAdapter};
pub use self::save::{LoraLayer, LoraSpec, save_comfy, save_peft};

use crate::{Elements, ParameterSource, ParameterSpec, StoredTable, WeightError, WeightFiles};

/// What PEFT puts before the model's own names.
const PREFIX: &str = "base_model.model.";

/// The parts of `adapter_config.json` that decide what is added to the weights.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default = "lora")]
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    rank_pattern: Map<String, Value>,
    #[serde(default)]
    alpha_pattern: Map<String, Value>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    // What changes the merged weights in ways not written here must not be passed over.
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    lora_bias: bool,
    bias: Option<String>,
    modules_to_save: Option<Vec<String>>,
}

fn lora() -> String {
    "LORA".to_owned()
}

/// The low-rank updates of one layer: `weight += scale * up down`.
#[derive(Debug)]
struct Update {
    down: Vec<f32>, // [rank, in]
    up: Vec<f32>,   // [out, rank]
    rank: usize,
    scale: f64,
    transposed: bool,
}

impl Update {
    /// Rows and columns of `up down`.
    fn shape(&self) -> [usize; 2] {
        let rank = self.rank.max(1);
        [self.up.len() / rank, self.down.len() / rank]
    }
}

/// A LoRA adapter in PEFT's layout: a folder of `adapter_config.json` and
/// `adapter_model.safetensors`.
#[derive(Debug)]
pub struct LoraAdapter {
    origin: String,
    updates: BTreeMap<String, Update>,
}

impl LoraAdapter {
    /// Fails if `update` does not fit the weight that it is added to.
    fn check(&self, update: &Update, spec: &ParameterSpec) -> Result<(), WeightError> {
        let [outputs, inputs] = update.shape();
        let expected = match update.transposed {
            true => [inputs, outputs],
            false => [outputs, inputs],
        };
        let fits = spec.shape.len() >= 2
            && spec.shape[0] == expected[0]
            && spec.shape[1..].iter().product::<usize>() == expected[1];
        if fits {
            return Ok(());
        }
        Err(WeightError::Shape {
            origin: self.origin.clone(),
            name: spec.name.clone(),
            expected: spec.shape.clone(),
            found: expected.to_vec(),
        })
    }

    /// Reads the adapter of a folder.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, WeightError> {
        let folder = folder.as_ref();
        let path = folder.join("adapter_config.json");
        let text = fs::read(&path).map_err(|source| WeightError::Io {
            path: path.clone(),
            source,
        })?;
        let weights = WeightFiles::open(folder.join("adapter_model.safetensors"))?;
        Self::new(&text, &weights, &folder.display().to_string())
    }

    /// The adapter of an `adapter_config.json`'s content and its weights; `origin` is what messages
    /// call it.
    pub fn new(config: &[u8], weights: &WeightFiles, origin: &str) -> Result<Self, WeightError> {
        let bad = |reason: String| WeightError::Config {
            origin: origin.to_owned(),
            reason,
        };
        let config: Config = serde_json::from_slice(config)
            .map_err(|error| bad(format!("adapter_config.json cannot be read: {error}")))?;
        let unknown = [
            (config.peft_type != "LORA", "a peft_type other than LORA"),
            (config.use_dora, "use_dora"),
            (config.lora_bias, "lora_bias"),
            (
                config.bias.as_deref().is_some_and(|bias| bias != "none"),
                "trained biases",
            ),
            (
                config.modules_to_save.is_some_and(|m| !m.is_empty()),
                "modules_to_save",
            ),
        ];
        let expression = |key: &String| key.contains(|c| "\\^$*+?()[]{}|".contains(c));
        let mut keys = config
            .rank_pattern
            .keys()
            .chain(config.alpha_pattern.keys());
        if let Some(key) = keys.find(|key| expression(key)) {
            return Err(bad(format!(
                "the pattern `{key}` is not a plain module name"
            )));
        }
        if let Some((_, what)) = unknown.iter().find(|(present, _)| *present) {
            return Err(bad(format!(
                "the adapter has {what}, which is not supported"
            )));
        }

        let mut updates = BTreeMap::new();
        for name in weights.names() {
            let module = name
                .strip_prefix(PREFIX)
                .and_then(|name| name.strip_suffix(".lora_A.weight"));
            let Some(module) = module else { continue };
            let (down_shape, down) = weights.read(name)?;
            let up_name = format!("{PREFIX}{module}.lora_B.weight");
            let (up_shape, up) = weights.read(&up_name)?;
            let rank = down_shape.first().copied().unwrap_or(0);
            let expected = pattern(&config.rank_pattern, module, config.r as f64);
            if rank == 0 || rank as f64 != expected || up_shape.get(1) != Some(&rank) {
                return Err(bad(format!(
                    "`{module}`: lora_A {down_shape:?} and lora_B {up_shape:?} do not have the \
                     rank {expected} of adapter_config.json"
                )));
            }
            let alpha = pattern(&config.alpha_pattern, module, config.lora_alpha);
            let rank_scale = if config.use_rslora {
                (rank as f64).sqrt()
            } else {
                rank as f64
            };
            let scale = alpha / rank_scale;
            let transposed = config.fan_in_fan_out;
            updates.insert(
                format!("{module}.weight"),
                Update {
                    down,
                    up,
                    rank,
                    scale,
                    transposed,
                },
            );
        }
        weights.finish(&[])?;
        if updates.is_empty() {
            return Err(bad(format!("holds no `{PREFIX}*.lora_A.weight` tensors")));
        }
        Ok(Self {
            origin: origin.to_owned(),
            updates,
        })
    }

    /// The names of the weights that the adapter changes, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.updates.keys().map(String::as_str)
    }
}

/// PEFT's rule for its patterns: the first key applies that is the end of the module's name, from a
/// dot on. (PEFT takes keys for regular expressions; those that are more than names are refused.)
fn pattern(patterns: &Map<String, Value>, module: &str, default: f64) -> f64 {
    let ends = |key: &str| {
        module
            .strip_suffix(key)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    patterns
        .iter()
        .find_map(|(key, value)| if ends(key) { value.as_f64() } else { None })
        .unwrap_or(default)
}

/// A source of parameters with adapters merged in.
pub struct Merged<'a> {
    base: &'a dyn ParameterSource,
    adapters: Vec<(&'a LoraAdapter, f64)>,
}

impl std::fmt::Debug for Merged<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merged")
            .field("adapters", &self.adapters.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Merged<'a> {
    /// `base` with each adapter added at its strength (1 is as trained). Fails if an adapter changes
    /// a weight that `base` does not have.
    pub fn new(
        base: &'a dyn ParameterSource,
        adapters: impl IntoIterator<Item = (&'a LoraAdapter, f64)>,
    ) -> Result<Self, WeightError> {
        let adapters: Vec<_> = adapters.into_iter().collect();
        for (adapter, _) in &adapters {
            let foreign: Vec<String> = adapter
                .names()
                .filter(|name| !base.contains(name))
                .map(str::to_owned)
                .collect();
            if !foreign.is_empty() {
                let origin = adapter.origin.clone();
                return Err(WeightError::Unexpected {
                    origin,
                    names: foreign,
                });
            }
        }
        Ok(Self { base, adapters })
    }

    /// Whether an adapter changes the weight of this name.
    fn changes(&self, name: &str) -> bool {
        let mut adapters = self.adapters.iter();
        adapters.any(|(adapter, _)| adapter.updates.contains_key(name))
    }
}

impl ParameterSource for Merged<'_> {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let mut weight = self.base.parameter(spec, device)?;
        for (adapter, strength) in &self.adapters {
            let Some(update) = adapter.updates.get(&spec.name) else {
                continue;
            };
            adapter.check(update, spec)?;
            let Update {
                down,
                up,
                rank,
                scale,
                transposed,
            } = update;
            let found = update.shape();
            let matrix = |values: &Vec<f32>, shape: [usize; 2]| {
                Tensor::<2>::from_data(TensorData::new(values.clone(), shape), device)
            };
            let delta = matrix(up, [found[0], *rank]).matmul(matrix(down, [*rank, found[1]]));
            let delta = if *transposed {
                delta.transpose()
            } else {
                delta
            };
            weight = weight + delta.reshape([spec.numel()]) * (scale * strength);
        }
        Ok(weight)
    }

    fn contains(&self, name: &str) -> bool {
        self.base.contains(name)
    }

    fn elements(&self, spec: &ParameterSpec) -> Result<Elements<'_>, WeightError> {
        if !self.changes(&spec.name) {
            return self.base.elements(spec);
        }
        let merged = self.parameter(spec, &Device::flex())?;
        let values = merged.into_data().try_into_vec::<f32>();
        values
            .map(Elements::Values)
            .map_err(|error| WeightError::Dtype {
                origin: "weights with a merged adapter".to_owned(),
                name: spec.name.clone(),
                found: format!("{error:?}"),
            })
    }

    fn verify(&self, spec: &ParameterSpec) -> Result<(), WeightError> {
        self.base.verify(spec)?;
        for (adapter, _) in &self.adapters {
            if let Some(update) = adapter.updates.get(&spec.name) {
                adapter.check(update, spec)?;
            }
        }
        Ok(())
    }

    fn table(&self, spec: &ParameterSpec) -> Result<Option<StoredTable>, WeightError> {
        if self.changes(&spec.name) {
            return Ok(None);
        }
        self.base.table(spec)
    }
}
