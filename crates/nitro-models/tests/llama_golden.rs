//! Llama against the reference.

mod common;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use common::{Case, data};
use nitro_models::Params;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_ops::Precision;
use safetensors::SafeTensors;

#[test]
fn llama() {
    for mut case in Case::all("llama") {
        let config: LlamaConfig = serde_json::from_value(case.json["config"].clone()).unwrap();
        let limit = case.json["tolerance"]["rel_l2"].as_f64().unwrap();
        let weights = case.files("weights");
        let device = Device::flex();
        let model = Llama::new(&config, &Params::new(&weights, &device, Precision::F32)).unwrap();
        weights.finish(&[]).unwrap();
        let bytes = std::fs::read(case.folder.join("inputs.safetensors")).unwrap();
        let inputs = SafeTensors::deserialize(&bytes).unwrap();
        let (ids, shape) = integers(&inputs, "input_ids");
        let (mask, _) = integers(&inputs, "attention_mask");
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, shape.clone()), &device);
        let mask: Vec<bool> = mask.into_iter().map(|x| x != 0).collect();
        let mask: Tensor<2, Bool> = Tensor::from_data(TensorData::new(mask, shape), &device);
        let mut found = vec![("inv_freq".to_string(), config.inverse_frequencies())];
        let hidden = model.forward_observed(ids, mask, &mut |name, x| {
            found.push((name.to_string(), data(x)));
        });
        let hidden = hidden.unwrap();
        found.push(("last_hidden_state".into(), data(hidden.clone())));
        found.push(("logits".into(), data(model.logits(hidden).unwrap())));
        let outputs = case.files("outputs");
        for name in outputs.names() {
            let found = found.iter().find(|(found, _)| found == name);
            let found = found
                .unwrap_or_else(|| panic!("{name} is not computed"))
                .1
                .clone();
            case.check(name, found, &outputs.read(name).unwrap().1, limit);
        }
        case.finish();
    }
}

fn integers(file: &SafeTensors<'_>, name: &str) -> (Vec<i64>, Vec<usize>) {
    let view = file.tensor(name).unwrap();
    let values = view
        .data()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()));
    (values.collect(), view.shape().to_vec())
}
