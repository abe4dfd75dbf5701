//! DINOv2: features with intermediate results, position tables, and the table's resampling.

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use nitro_models::Params;
use nitro_models::dinov2::{Dinov2, Dinov2Config};
use nitro_models::{TensorMap, WeightFiles};
use nitro_ops::Precision;

use crate::compare::Report;
use crate::files::{Case, Tensors, values};

/// Whether the case is one of the model (the others are about pictures before it).
pub(crate) fn is_model(case: &Case) -> bool {
    case.json["inputs"]["files"].is_null()
}

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    if inputs.has("pos_embed") {
        return table_alone(case, &inputs, &outputs, report);
    }
    let weights = case.weights()?;
    let config: Dinov2Config = case.get("/config")?;
    // A released checkpoint has heads of 64 channels; these small ones have fewer.
    let inferred = Dinov2Config {
        num_heads: config.num_heads,
        ..Dinov2Config::from_weights(&weights)?
    };
    report.equal("configuration read off the checkpoint", &inferred, &config);
    let mut model = build(&config, &weights)?;
    weights.finish(&[])?;
    if let Ok(grid) = case.get::<[usize; 2]>("/inputs/new_grid") {
        model = model.resampled(grid);
    }
    let tolerance = case.rel_l2()?;
    if outputs.has("pos_embed_resampled") {
        let table = values(model.positions())?;
        outputs.close(report, "pos_embed_resampled", &table, tolerance)?;
    }
    for name in inputs.names() {
        let pictures: Tensor<4> = inputs.tensor(name)?;
        let [_, _, height, width] = pictures.dims();
        // A file of several pictures prefixes what belongs to each.
        let key = |part: &str| match name {
            "x" => part.to_owned(),
            name => format!("{name}.{part}"),
        };
        let mut seen = vec![(key("pos_embed"), model.positions_for(height, width))];
        let features = model.forward_observed(pictures, &mut |part, value| {
            seen.push((key(part), value));
        })?;
        seen.push((key("x_norm_patchtokens"), features.patches));
        seen.push((key("x_prenorm"), features.prenorm));
        seen.extend(features.registers.map(|r| (key("x_norm_regtokens"), r)));
        for (name, value) in seen.into_iter().filter(|(name, _)| outputs.has(name)) {
            outputs.close(report, &name, &values(value)?, tolerance)?;
        }
        let class = values(features.class)?;
        outputs.close(report, &key("x_norm_clstoken"), &class, tolerance)?;
    }
    outputs.finish(report);
    Ok(())
}

/// Only a table is given, of a model whose other tensors do not matter.
fn table_alone(
    case: &Case,
    inputs: &Tensors,
    outputs: &Tensors,
    report: &mut Report,
) -> Result<()> {
    let table: Tensor<3> = inputs.tensor("pos_embed")?;
    let [_, count, width] = table.dims();
    let config = Dinov2Config {
        img_size: (count - 1).isqrt() * 14,
        embed_dim: width,
        num_heads: 1,
        depth: 1,
        ..Dinov2Config::vit_b14()
    };
    let device = Device::flex();
    let random = nitro_models::RandomInit::new(0);
    let all = TensorMap::collect(&random, &device, |p| Dinov2::new(&config, p).map(drop))?;
    let all = all.map(|spec, tensor| match spec.name.as_str() {
        "pos_embed" => table.clone().flatten(0, 2),
        _ => tensor,
    });
    let model = Dinov2::new(&config, &Params::new(&all, &device, Precision::F32))?;
    let model = model.resampled(
        case.get("/inputs/new_grid")
            .or(case.get("/config/new_grid"))?,
    );
    let found = values(model.positions())?;
    outputs.close(report, "resampled", &found, case.rel_l2()?)?;
    outputs.finish(report);
    Ok(())
}

fn build(config: &Dinov2Config, weights: &WeightFiles) -> Result<Dinov2> {
    let params = Params::new(weights, &Device::flex(), Precision::F32);
    Ok(Dinov2::new(config, &params)?)
}
