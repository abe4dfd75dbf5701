//! The benchmarks' scorers with the goldens' tiny weights in the place of the official ones.

use std::collections::HashMap;
use std::path::Path;

use nitro_models::{DType, WeightFiles, save_safetensors};
use serde_json::{Value, json};

use super::golden;

fn config(case: &str) -> Value {
    let text = std::fs::read_to_string(golden(case).join("case.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["config"].clone()
}

/// Writes JSON, with the folders above it.
pub(crate) fn write(path: &Path, value: &Value) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
}

/// A tiny CLIP with CLIP's real vocabulary, as open_clip lays it out on the Hub.
pub(crate) fn tiny_clip(folder: &Path) {
    let case = "clip_hps/hps_score";
    write(
        &folder.join("open_clip_config.json"),
        &json!({ "model_cfg": config(case) }),
    );
    let weights = folder.join("open_clip_model.safetensors");
    std::fs::copy(golden(case).join("weights.safetensors"), weights).unwrap();
}

/// The golden ImageReward with a table of embeddings as long as BERT's vocabulary.
pub(crate) fn tiny_image_reward(folder: &Path) {
    const VOCABULARY: usize = 30524;
    let config = config("image_reward/tiny");
    let mut med = config["med_config"].clone();
    med["vocab_size"] = VOCABULARY.into();
    med["vit"] = config["vit"].clone();
    write(&folder.join("med_config.json"), &med);
    let stored = WeightFiles::open(golden("image_reward/tiny/weights.safetensors")).unwrap();
    let names = stored
        .names()
        .filter(|name| !name.ends_with("position_ids"));
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = names
        .map(|name| {
            let (mut shape, mut values) = stored.read(name).unwrap();
            if name.ends_with("word_embeddings.weight") {
                shape[0] = VOCABULARY;
                values = (0..VOCABULARY * shape[1])
                    .map(|i| values[i * 7 % values.len()])
                    .collect();
            }
            (name.to_owned(), shape, values)
        })
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(n, s, v)| (n.clone(), s.clone(), v.as_slice()))
        .collect();
    let file = folder.join("model.safetensors");
    save_safetensors(file, &tensors, &HashMap::new(), DType::F32).unwrap();
}

/// The golden detector, which knows five classes.
pub(crate) fn tiny_detector(folder: &Path) {
    let config = config("mask2former/swin_tiny");
    let mut model = config["model"].clone();
    model["backbone_config"] = config["backbone"].clone();
    write(&folder.join("config.json"), &model);
    let weights = golden("mask2former/swin_tiny/weights.safetensors");
    std::fs::copy(weights, folder.join("model.safetensors")).unwrap();
}

/// Two prompts that the tiny detector can judge: its five classes carry GenEval's first five names.
pub(crate) fn geneval_prompts(file: &Path) {
    let lines = [
        json!({ "tag": "colors", "include": [{ "class": "person", "count": 1, "color": "red" }],
            "prompt": "a photo of a red person" }),
        json!({ "tag": "single_object", "include": [{ "class": "car", "count": 1 }],
            "prompt": "a photo of a car" }),
    ];
    let prompts: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(file, prompts).unwrap();
}
