//! The full-size models with weights from a formula.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use burn::tensor::Device;
use nitro_models::emmdit::Emmdit;
use nitro_models::{FormulaWeights, Params};
use nitro_ops::Precision;

use crate::compare::Report;
use crate::emmdit::Official;
use crate::files::{Case, values};
use crate::{dcae, llama};

/// Whether a case takes seconds: an E-MMDiT does.
pub(crate) fn is_quick(case: &Case) -> bool {
    case.json["config"].get("use_sub_attn").is_some()
}

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let weights = FormulaWeights::new(case.get::<String>("/salt")?);
    for (key, precision) in [
        ("f32", Precision::F32),
        ("bf16", Precision::Bf16),
        ("int8", Precision::Int8),
    ] {
        let autoencoder = case.json["config"].get("latent_channels").is_some();
        if case.json["tolerance"].get(key).is_none() || (autoencoder && key == "int8") {
            continue;
        }
        let tolerance = case.get(&format!("/tolerance/{key}"))?;
        let params = Params::new(&weights, &Device::flex(), precision);
        // As they are when they paint: with packed weights.
        let params = params.for_inference();
        // The model is told by the form of its configuration.
        let config = &case.json["config"];
        if is_quick(case) {
            emmdit(case, report, &params, key, tolerance)?;
        } else if config.get("latent_channels").is_some() {
            dcae::full_size(case, report, (&params, &weights), key, tolerance)?;
        } else if config.get("rope_theta").is_some() {
            llama::full_size(case, report, &params, key, tolerance)?;
        } else {
            bail!("no model known for this configuration");
        }
    }
    Ok(())
}

fn emmdit(
    case: &Case,
    report: &mut Report,
    params: &Params<'_>,
    precision: &str,
    tolerance: f64,
) -> Result<()> {
    let config = case.get::<Official>("/config")?.config();
    let count: usize = config
        .parameter_counts()
        .iter()
        .map(|(_, count)| count)
        .sum();
    report.equal("parameters", &count, &case.get("/parameters")?);
    let model = Emmdit::new(&config, params)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let latents = inputs.tensor("hidden_states")?;
    let text = inputs.tensor("encoder_hidden_states")?;
    let time = case.get("/timestep")?;
    let sample = fastest(precision, || {
        values(model.forward(latents.clone(), text.clone(), &[time])?)
    })?;
    report.close(
        &format!("sample ({precision})"),
        &sample,
        &outputs.f32s("sample")?,
        tolerance,
    );
    outputs.finish(report);
    Ok(())
}

/// Runs `forward` a few times; prints the shortest time.
pub(crate) fn fastest<T>(precision: &str, mut forward: impl FnMut() -> Result<T>) -> Result<T> {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        forward()?;
        best = best.min(begun.elapsed());
    }
    println!("  {precision} forward: {:.1} ms", best.as_secs_f64() * 1e3);
    forward()
}
