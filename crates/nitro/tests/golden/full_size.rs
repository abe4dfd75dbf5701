//! The full-size models with weights from a formula.

use std::time::Instant;

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
    for (key, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
        if case.json["tolerance"].get(key).is_none() {
            continue;
        }
        let tolerance = case.get(&format!("/tolerance/{key}"))?;
        let params = Params::new(&weights, &Device::flex(), precision);
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
    let begun = Instant::now();
    let sample = values(model.forward(latents, text, &[case.get("/timestep")?])?)?;
    println!(
        "  {precision} forward: {:.2} s",
        begun.elapsed().as_secs_f64()
    );
    report.close(
        &format!("sample ({precision})"),
        &sample,
        &outputs.f32s("sample")?,
        tolerance,
    );
    outputs.finish(report);
    Ok(())
}
