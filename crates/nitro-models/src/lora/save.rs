//! Writing adapters: PEFT's folder, and one file in the key layout that ComfyUI reads.

use std::collections::HashMap;
use std::path::Path;

use serde_json::json;

use super::PREFIX;
use crate::{DType, WeightError, save_safetensors};

/// What `adapter_config.json` says about an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// The rank of every update.
    pub rank: usize,
    /// Updates are scaled by `alpha / rank`.
    pub alpha: f64,
    /// The layers that were adapted: whole module names, or what they end in after a dot.
    pub targets: Vec<String>,
    /// The model that was adapted: a folder or a name on the Hub.
    pub base_model: String,
}

/// The update of one linear layer.
#[derive(Clone, Debug)]
pub struct LoraLayer<'a> {
    /// The layer's official name, without `.weight`.
    pub module: &'a str,
    /// LoRA's A, `[rank, in]`.
    pub down: &'a [f32],
    /// LoRA's B, `[out, rank]`.
    pub up: &'a [f32],
}

impl LoraLayer<'_> {
    fn shapes(&self, rank: usize) -> [Vec<usize>; 2] {
        let rank = rank.max(1);
        [
            vec![rank, self.down.len() / rank],
            vec![self.up.len() / rank, rank],
        ]
    }
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT's `save_pretrained` does.
///
/// # Errors
/// When the folder cannot be written, or a layer's values do not have the rank of `spec`.
pub fn save_peft(
    folder: &Path,
    spec: &LoraSpec,
    layers: &[LoraLayer<'_>],
    dtype: DType,
) -> Result<(), WeightError> {
    let io = |source| WeightError::Io {
        path: folder.to_owned(),
        source,
    };
    std::fs::create_dir_all(folder).map_err(io)?;
    let config = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": spec.base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": spec.targets,
        "task_type": null,
        "use_dora": false,
        "use_rslora": false,
    });
    let mut tensors = Vec::new();
    for layer in layers {
        let [down, up] = layer.shapes(spec.rank);
        let name = |part: &str| format!("{PREFIX}{}.{part}.weight", layer.module);
        tensors.push((name("lora_A"), down, layer.down));
        tensors.push((name("lora_B"), up, layer.up));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // The configuration comes last: a folder that has one is whole.
    save_safetensors(
        folder.join("adapter_model.safetensors"),
        &tensors,
        &metadata,
        dtype,
    )?;
    let text = format!("{config:#}\n");
    let path = folder.join("adapter_config.json");
    nitro_files::write_bytes(&path, text.as_bytes())
        .map_err(|source| WeightError::Io { path, source })
}

/// Writes one safetensors file with `diffusion_model.MODULE.{lora_down.weight,lora_up.weight,alpha}`,
/// the generic key layout of ComfyUI's LoRA loader, and kohya's `ss_*` metadata.
///
/// # Errors
/// As [`save_peft`].
pub fn save_comfy(
    path: &Path,
    spec: &LoraSpec,
    layers: &[LoraLayer<'_>],
    dtype: DType,
) -> Result<(), WeightError> {
    let alpha = [spec.alpha as f32];
    let mut tensors = Vec::new();
    for layer in layers {
        let [down, up] = layer.shapes(spec.rank);
        let name = |part: &str| format!("diffusion_model.{}.{part}", layer.module);
        tensors.push((name("lora_down.weight"), down, layer.down));
        tensors.push((name("lora_up.weight"), up, layer.up));
        tensors.push((name("alpha"), Vec::new(), alpha.as_slice()));
    }
    let metadata = [
        ("ss_network_module", "networks.lora".to_owned()),
        ("ss_network_dim", spec.rank.to_string()),
        ("ss_network_alpha", spec.alpha.to_string()),
        ("ss_sd_model_name", spec.base_model.clone()),
        ("modelspec.architecture", "nitro-e/lora".to_owned()),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    save_safetensors(path, &tensors, &metadata, dtype)
}
