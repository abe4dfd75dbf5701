//! Llama files and configurations: what is read, and what is refused.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{ParameterSpec, Params, RandomInit, TensorMap, WeightError};
use nitro_ops::Precision;
use serde_json::json;

fn collect(config: &LlamaConfig) -> TensorMap {
    let build = |p: &Params<'_>| Llama::new(config, p).map(drop);
    TensorMap::collect(&RandomInit::new(0), &Device::flex(), build).unwrap()
}

fn build(config: &LlamaConfig, map: &TensorMap) -> Result<Llama, WeightError> {
    Llama::new(config, &Params::new(map, &Device::flex(), Precision::F32))
}

fn prompt(ids: &[i64], real: usize) -> (Tensor<2, Int>, Tensor<2, Bool>) {
    let device = Device::flex();
    let mask: Vec<bool> = (0..ids.len()).map(|i| i < real).collect();
    let mask = TensorData::new(mask, [1, ids.len()]);
    let ids = TensorData::new(ids.to_vec(), [1, ids.len()]);
    (
        Tensor::from_data(ids, &device),
        Tensor::from_data(mask, &device),
    )
}

fn values(tensor: Tensor<3>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

#[test]
fn files_without_the_model_prefix_give_the_same_states() {
    let config = LlamaConfig::miniature(50);
    let map = collect(&config);
    let mut bare = TensorMap::default();
    for (spec, tensor) in map.iter() {
        let name = spec.name.strip_prefix("model.").unwrap().to_owned();
        bare.insert(
            ParameterSpec {
                name,
                ..spec.clone()
            },
            tensor.clone(),
        );
    }
    let states = |map| {
        let (ids, mask) = prompt(&[1, 7, 3, 49], 3);
        values(build(&config, map).unwrap().forward(ids, mask).unwrap())
    };
    assert_eq!(states(&map), states(&bare));
}

#[test]
fn real_tokens_depend_on_neither_later_tokens_nor_padding() {
    let config = LlamaConfig::miniature(50);
    let model = build(&config, &collect(&config)).unwrap();
    let states = |ids: &[i64], real| {
        let (ids, mask) = prompt(ids, real);
        values(model.forward(ids, mask).unwrap())
    };
    let alone = states(&[4, 8], 2);
    let padded = states(&[4, 8, 2, 2, 2], 2);
    let longer = states(&[4, 8, 9, 10, 11], 5);
    let real = alone.len();
    for other in [&padded, &longer] {
        let gap = alone.iter().zip(&other[..real]).map(|(a, b)| (a - b).abs());
        assert!(gap.fold(0.0, f32::max) < 1e-5);
    }
    // Padded positions see the real tokens only, so what the padding is must not matter to others.
    let last = |states: &[f32]| states[states.len() - 128..].to_vec();
    let changed = states(&[4, 8, 3, 3, 2], 2);
    let gap = last(&padded)
        .into_iter()
        .zip(last(&changed))
        .map(|(a, b)| (a - b).abs());
    assert!(gap.fold(0.0, f32::max) < 1e-5);
}

#[test]
fn an_untied_head_is_read_where_there_is_one() {
    let config = LlamaConfig {
        tie_word_embeddings: false,
        ..LlamaConfig::miniature(50)
    };
    let map = collect(&config);
    assert!(map.get("lm_head.weight").is_some());
    let model = build(&config, &map).unwrap();
    let (ids, mask) = prompt(&[1, 2, 3], 3);
    let hidden = model.forward(ids, mask).unwrap();
    assert_eq!(model.logits(hidden.clone()).unwrap().dims(), [1, 3, 50]);

    let mut headless = TensorMap::default();
    for (spec, tensor) in map.iter() {
        if let Some(name) = spec.name.strip_prefix("model.") {
            let spec = ParameterSpec {
                name: name.to_owned(),
                ..spec.clone()
            };
            headless.insert(spec, tensor.clone());
        }
    }
    let error = build(&config, &headless)
        .unwrap()
        .logits(hidden)
        .unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}

#[test]
fn configurations_that_cannot_be_built_are_named() {
    let miniature = LlamaConfig::miniature(50);
    for (change, told) in [
        (json!({ "hidden_act": "gelu" }), "hidden_act is \"gelu\""),
        (
            json!({ "num_key_value_heads": 3 }),
            "cannot share 3 key-value heads",
        ),
        (json!({ "head_dim": 7 }), "an even number is needed"),
        (
            json!({ "head_dim": null, "hidden_size": 130 }),
            "hidden_size 130 is no multiple",
        ),
    ] {
        let mut config = serde_json::to_value(&miniature).unwrap();
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        let config: LlamaConfig = serde_json::from_value(config).unwrap();
        let random = RandomInit::new(0);
        let params = Params::new(&random, &Device::flex(), Precision::F32);
        let error = Llama::new(&config, &params).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn a_rope_scaling_of_another_kind_is_refused() {
    let mut config = serde_json::to_value(LlamaConfig::miniature(50)).unwrap();
    config["rope_scaling"] = json!({ "rope_type": "yarn", "factor": 4.0 });
    let error = serde_json::from_value::<LlamaConfig>(config)
        .unwrap_err()
        .to_string();
    assert!(error.contains("yarn"), "{error}");
}
