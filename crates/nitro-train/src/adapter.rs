//! Low-rank adapters as the parameters of a run.

use std::path::Path;

use nitro_models::{
    DType, Init, LiveAdapter, LoraLayer, LoraSpec, LowRank, Params, TensorMap, save_comfy,
    save_peft,
};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::RunConfig;
use crate::start;
use crate::store::{Entry, ParameterStore};

/// Which layers are adapted, and how strongly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Rank of every update.
    pub rank: usize,
    /// Updates are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Layers by what their names end in, as PEFT's `target_modules`.
    #[serde(default = "all_targets")]
    pub targets: Vec<String>,
}

/// Attention projections of both streams and their feed-forward layers.
fn all_targets() -> Vec<String> {
    [
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_out.0",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The adapted layers of a model.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    config: AdapterConfig,
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    module: String,
    inputs: usize,
    outputs: usize,
}

impl Adapter {
    /// The layers of a model with these parameters that `config` names.
    pub(crate) fn new(config: &AdapterConfig, base: &TensorMap) -> Result<Self, TrainError> {
        let wrong = |reason: String| TrainError::Config {
            origin: "lora".into(),
            reason,
        };
        if config.rank == 0 || !config.alpha.is_finite() {
            return Err(wrong(format!(
                "rank {} with alpha {}: expected a rank of at least 1 and a finite alpha",
                config.rank, config.alpha
            )));
        }
        let mut layers = Vec::new();
        for target in &config.targets {
            let before = layers.len();
            for (spec, _) in base.iter() {
                let Some(module) = spec.name.strip_suffix(".weight") else {
                    continue;
                };
                let ends = module.strip_suffix(target.as_str());
                if !ends.is_some_and(|rest| rest.is_empty() || rest.ends_with('.')) {
                    continue;
                }
                let &[outputs, inputs] = spec.shape.as_slice() else {
                    return Err(wrong(format!(
                        "target `{target}`: `{module}` is not a linear layer (its weight is {:?})",
                        spec.shape
                    )));
                };
                layers.push(Layer {
                    module: module.to_owned(),
                    inputs,
                    outputs,
                });
            }
            if layers.len() == before {
                return Err(wrong(format!(
                    "target `{target}` names no layer of the model"
                )));
            }
        }
        layers.sort_by(|a, b| a.module.cmp(&b.module));
        layers.dedup_by(|a, b| a.module == b.module);
        Ok(Self {
            config: config.clone(),
            layers,
        })
    }

    /// The adapter with parameters `MODULE.lora_A.weight` and `MODULE.lora_B.weight` of `p`,
    /// initialised as PEFT does: A as a linear layer's weight, B with zeros.
    pub(crate) fn build(&self, p: &Params<'_>) -> Result<LiveAdapter, TrainError> {
        let rank = self.config.rank;
        let mut live = LiveAdapter::new("the adapter in training");
        for layer in &self.layers {
            let p = p.sub(&layer.module);
            let bound = Init::Uniform((layer.inputs as f64).powf(-0.5));
            let update = LowRank {
                down: p
                    .sub("lora_A")
                    .tensor("weight", [rank, layer.inputs], bound)?,
                up: p
                    .sub("lora_B")
                    .tensor("weight", [layer.outputs, rank], Init::Zeros)?,
                scale: self.config.alpha / rank as f64,
            };
            live.insert(&layer.module, update);
        }
        Ok(live)
    }

    /// Its parameters as a run of `config` begins with them: fresh, or those of `run.init_from`.
    pub(crate) fn initial(&self, config: &RunConfig) -> Result<ParameterStore, TrainError> {
        start::initial(config, |p| self.build(p).map(drop))
    }

    /// Writes the averaged adapter of `store` as a PEFT folder, and beside its weights the same in
    /// ComfyUI's key layout.
    pub(crate) fn export(
        &self,
        store: &ParameterStore,
        folder: &Path,
        base_model: &str,
    ) -> Result<(), TrainError> {
        let part = |layer: &Layer, name: &str| -> Vec<f32> {
            store
                .get(&format!("{}.{name}.weight", layer.module))
                .map(Entry::averaged)
                .unwrap_or_default()
                .to_vec()
        };
        let values: Vec<[Vec<f32>; 2]> = self
            .layers
            .iter()
            .map(|layer| ["lora_A", "lora_B"].map(|name| part(layer, name)))
            .collect();
        let layers: Vec<LoraLayer<'_>> = self
            .layers
            .iter()
            .zip(&values)
            .map(|(layer, [down, up])| LoraLayer {
                module: &layer.module,
                down,
                up,
            })
            .collect();
        let spec = LoraSpec {
            rank: self.config.rank,
            alpha: self.config.alpha,
            targets: self.config.targets.clone(),
            base_model: base_model.to_owned(),
        };
        save_peft(folder, &spec, &layers, DType::F16)?;
        Ok(save_comfy(
            &folder.join("comfyui.safetensors"),
            &spec,
            &layers,
            DType::F16,
        )?)
    }
}
