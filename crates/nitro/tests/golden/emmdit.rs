//! E-MMDiT: forward passes with all intermediate results, and gradients of the training loss.

use std::collections::BTreeMap;

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use nitro_models::emmdit::{Emmdit, EmmditConfig, EmmditOutput};
use nitro_models::{Params, TensorMap, WeightFiles};
use nitro_ops::Precision;
use nitro_train::export::{Which, official_state_dict};
use nitro_train::losses::{alignment, flow_matching, velocity_tokens};
use nitro_train::store::ParameterStore;
use serde::Deserialize;

use crate::compare::Report;
use crate::files::{Case, Tensors, values};

/// The constructor arguments of the official model, with its defaults.
#[derive(Deserialize)]
#[serde(default)]
pub(crate) struct Official {
    sample_size: usize,
    patch_size: usize,
    in_channels: usize,
    attention_head_dim: usize,
    num_attention_heads: usize,
    caption_channels: usize,
    out_channels: Option<usize>,
    pos_embed_max_size: usize,
    use_sub_attn: bool,
}

impl Default for Official {
    fn default() -> Self {
        Self {
            sample_size: 16,
            patch_size: 1,
            in_channels: 32,
            attention_head_dim: 32,
            num_attention_heads: 24,
            caption_channels: 2048,
            out_channels: Some(32),
            pos_embed_max_size: 96,
            use_sub_attn: true,
        }
    }
}

impl Official {
    pub(crate) fn config(&self) -> EmmditConfig {
        EmmditConfig {
            sample_size: self.sample_size,
            patch_size: self.patch_size,
            in_channels: self.in_channels,
            out_channels: self.out_channels.unwrap_or(self.in_channels),
            heads: self.num_attention_heads,
            head_dim: self.attention_head_dim,
            caption_channels: self.caption_channels,
            pos_embed_max_size: self.pos_embed_max_size,
            use_sub_attn: self.use_sub_attn,
            ..EmmditConfig::nitro_e_512()
        }
    }
}

/// The case's configuration, which must also be what its checkpoint tells.
pub(crate) fn config(
    case: &Case,
    weights: &WeightFiles,
    report: &mut Report,
) -> Result<EmmditConfig> {
    let official: EmmditConfig = case.get::<Official>("/config")?.config();
    // Only resolution and subregion attention are not in the checkpoint.
    let variant = EmmditConfig {
        sample_size: official.sample_size,
        use_sub_attn: official.use_sub_attn,
        ..EmmditConfig::nitro_e_512()
    };
    let inferred = EmmditConfig::from_weights(weights, &variant)?;
    let told = EmmditConfig {
        repa: inferred.repa.clone(),
        block_groups: inferred.block_groups,
        ..official
    };
    report.equal("configuration read off the checkpoint", &inferred, &told);
    Ok(inferred)
}

pub(crate) fn forward(case: &Case, report: &mut Report) -> Result<()> {
    let weights = case.weights()?;
    let config = config(case, &weights, report)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let plain = Params::new(&weights, &Device::flex(), Precision::F32);
    for params in [plain.for_inference(), plain] {
        let model = Emmdit::new(&config, &params)?;
        weights.finish(&[])?;
        let mut seen: Vec<(String, Tensor<3>)> = Vec::new();
        let mut observer = |name: &str, value: Tensor<3>| seen.push((name.to_owned(), value));
        let sample = model.forward_observed(
            inputs.tensor("hidden_states")?,
            inputs.tensor("encoder_hidden_states")?,
            &inputs.f32s("timestep")?,
            Some(&mut observer),
        )?;
        for (name, value) in seen {
            if outputs.has(&name) {
                outputs.close(report, &name, &values(value)?, tolerance)?;
            }
        }
        outputs.close(report, "sample", &values(sample)?, tolerance)?;
    }
    outputs.finish(report);
    Ok(())
}

pub(crate) fn train(case: &Case, report: &mut Report) -> Result<()> {
    let weights = case.weights()?;
    let config = config(case, &weights, report)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;

    let device = Device::flex().autodiff();
    let build = |p: &Params<'_>| Emmdit::new(&config, p).map(drop);
    let parameters = TensorMap::collect(&weights, &device, build)?.map(|spec, tensor| {
        if spec.trainable {
            tensor.require_grad()
        } else {
            tensor
        }
    });
    weights.finish(&[])?;
    let store = ParameterStore::from_source(&weights, |p| Emmdit::new(&config, p).map(drop))?;
    let export = official_state_dict(&store, &config, Which::Raw);
    let exported = export
        .iter()
        .map(|(name, shape, _)| (name.as_str(), shape.as_slice()));
    let official = weights
        .names()
        .map(|name| (name, weights.shape(name).unwrap_or_default()));
    let (exported, official): (BTreeMap<_, _>, BTreeMap<_, _>) =
        (exported.collect(), official.collect());
    report.equal("names and shapes of an export", &exported, &official);

    let model = Emmdit::new(&config, &Params::new(&parameters, &device, Precision::F32))?;
    let output = model.forward_train(
        inputs.tensor("noisy_latents")?,
        inputs.tensor("encoder_hidden_states")?,
        &inputs.f32s("timestep")?,
    )?;
    outputs.close(
        report,
        "model_pred",
        &values(output.tokens.clone())?,
        tolerance,
    )?;
    for (i, projection) in output.projections.iter().enumerate() {
        let name = target_name(&outputs, "zs_tilde", i);
        outputs.close(report, &name, &values(projection.clone())?, tolerance)?;
    }

    let velocity = inputs.tensor::<4>("noise")? - inputs.tensor::<4>("latents")?;
    let targets: Vec<Tensor<3>> = (0..output.projections.len())
        .map(|i| inputs.tensor(&target_name(&inputs, "zs", i)))
        .collect::<Result<_>>()?;
    let (difference, alignment) = losses(output, velocity, &targets, config.patch_size);
    let weight: f64 = case.get("/inputs/proj_coeff")?;
    outputs.close(report, "diff_loss", &values(difference.clone())?, tolerance)?;
    let mut loss = difference;
    if let Some(alignment) = alignment {
        outputs.close(report, "proj_loss", &values(alignment.clone())?, tolerance)?;
        loss = loss + alignment * weight;
    }
    outputs.close(report, "loss", &values(loss.clone())?, tolerance)?;
    outputs.finish(report);

    let grads = loss.backward();
    let expected = case.tensors("grads")?;
    let zero: Vec<String> = case.get("/grads_exactly_zero")?;
    let none: Vec<String> = case.get("/grads_none")?;
    for (spec, tensor) in parameters.iter().filter(|(spec, _)| spec.trainable) {
        let found = match tensor.grad(&grads) {
            Some(grad) => values(grad)?,
            None => vec![0.0; spec.numel()], // nothing that the loss reads depends on it
        };
        let name = format!("grad {}", spec.name);
        if zero.contains(&spec.name) || none.contains(&spec.name) {
            report.equal(&name, &found.iter().all(|&g| g == 0.0), &true);
            if expected.has(&spec.name) {
                expected.get(&spec.name)?;
            }
        } else {
            report.close(&name, &found, &expected.f32s(&spec.name)?, tolerance);
        }
    }
    expected.finish(report);
    Ok(())
}

/// `zs` for the only projector, `zs.1` for the second of several.
pub(crate) fn target_name(tensors: &Tensors, name: &str, index: usize) -> String {
    if index == 0 && tensors.has(name) {
        name.to_owned()
    } else {
        format!("{name}.{index}")
    }
}

/// The product's losses, against which the official ones are compared.
pub(crate) fn losses(
    output: EmmditOutput,
    velocity: Tensor<4>,
    targets: &[Tensor<3>],
    patch: usize,
) -> (Tensor<1>, Option<Tensor<1>>) {
    let target = velocity_tokens(velocity, patch);
    (
        flow_matching(output.tokens, target),
        alignment(output.projections, targets),
    )
}
