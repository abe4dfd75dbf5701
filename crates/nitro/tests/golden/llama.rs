//! Llama as a text encoder: all hidden states, padded positions included, and logits.

use anyhow::Result;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use nitro_models::Params;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_ops::Precision;

use crate::compare::Report;
use crate::files::{Case, Tensors, values};
use crate::full_size;

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let config: LlamaConfig = case.get("/config")?;
    let weights = case.weights()?;
    let device = Device::flex();
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let (ids, mask) = prompt(&inputs, &device)?;
    let plain = Params::new(&weights, &device, Precision::F32);
    for params in [plain.for_inference(), plain] {
        let model = Llama::new(&config, &params)?;
        weights.finish(&[])?;
        let mut seen: Vec<(String, Tensor<3>)> = Vec::new();
        let mut observer = |name: &str, x: Tensor<3>| seen.push((name.to_owned(), x));
        let hidden = model.forward_observed(ids.clone(), mask.clone(), &mut observer)?;
        seen.push(("last_hidden_state".to_owned(), hidden.clone()));
        seen.push(("logits".to_owned(), model.logits(hidden)?));
        for (name, value) in seen.into_iter().filter(|(name, _)| outputs.has(name)) {
            outputs.close(report, &name, &values(value)?, tolerance)?;
        }
    }
    if outputs.has("inv_freq") {
        outputs.close(report, "inv_freq", &config.inverse_frequencies(), tolerance)?;
    }
    outputs.finish(report);
    Ok(())
}

pub(crate) fn full_size(
    case: &Case,
    report: &mut Report,
    params: &Params<'_>,
    precision: &str,
    tolerance: f64,
) -> Result<()> {
    let model = Llama::new(&case.get::<LlamaConfig>("/config")?, params)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let (ids, mask) = prompt(&inputs, params.device())?;
    let hidden = full_size::fastest(precision, || {
        values(model.forward(ids.clone(), mask.clone())?)
    })?;
    report.close(
        &format!("last_hidden_state ({precision})"),
        &hidden,
        &outputs.f32s("last_hidden_state")?,
        tolerance,
    );
    outputs.finish(report);
    Ok(())
}

/// Token ids and their mask, `[batch, tokens]` each.
fn prompt(inputs: &Tensors, device: &Device) -> Result<(Tensor<2, Int>, Tensor<2, Bool>)> {
    let shape = inputs.get("input_ids")?.shape.clone();
    let ids = TensorData::new(inputs.i64s("input_ids")?, shape.clone());
    let mask = inputs
        .i64s("attention_mask")?
        .into_iter()
        .map(|seen| seen != 0);
    let mask = TensorData::new(mask.collect::<Vec<bool>>(), shape);
    Ok((
        Tensor::from_data(ids, device),
        Tensor::from_data(mask, device),
    ))
}
