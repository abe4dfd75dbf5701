//! Whole optimiser steps: loss, gradient, clipping, AdamW, warm-up and moving average in the
//! official order.

use anyhow::Result;
use burn::tensor::{Device, Tensor, TensorData};
use nitro_diffusion::schedule::{FlowMatchEuler, add_noise};
use nitro_models::Params;
use nitro_models::emmdit::Emmdit;
use nitro_ops::Precision;
use nitro_train::config::OptimizerConfig;
use nitro_train::optimizer::{learning_rate, named_gradients, step};
use nitro_train::store::ParameterStore;
use serde::Deserialize;
use serde::de::Error as _;
use serde_json::Value;

use crate::compare::{Report, rel_l2};
use crate::emmdit::{config, losses, target_name};
use crate::files::{Case, Tensors, values};

/// `inputs` of `case.json`.
#[derive(Deserialize)]
struct Settings {
    steps: usize,
    num_warmup_steps: u64,
    lr: f64,
    weight_decay: f64,
    eps: f64,
    betas: (f64, f64),
    gradient_clip: f64,
    ema_rate: f64,
    proj_coeff: f64,
    scaling_factor: f64,
    num_train_timesteps: usize,
    fm_shift: f64,
    indices: Vec<Vec<usize>>,
    #[serde(deserialize_with = "flags")]
    drop_mask: Vec<Vec<bool>>,
}

fn flags<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Vec<bool>>, D::Error> {
    let rows = Vec::<Vec<Value>>::deserialize(from)?;
    let flag = |value: Value| match value {
        Value::Bool(flag) => Ok(flag),
        Value::Number(number) => Ok(number.as_f64() != Some(0.0)),
        other => Err(D::Error::custom(format!("{other} is no flag"))),
    };
    rows.into_iter()
        .map(|row| row.into_iter().map(flag).collect())
        .collect()
}

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let settings: Settings = case.get("/inputs")?;
    let weights = case.weights()?;
    let config = config(case, &weights, report)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let schedule = FlowMatchEuler::new(settings.num_train_timesteps, settings.fm_shift)?;
    let optimizer = OptimizerConfig {
        lr: settings.lr,
        weight_decay: settings.weight_decay,
        eps: settings.eps,
        betas: settings.betas,
    };
    let rate = |step: u64| {
        learning_rate(
            settings.lr,
            step,
            settings.steps as u64,
            settings.num_warmup_steps,
            0,
        )
    };

    let mut store = ParameterStore::from_source(&weights, |p| Emmdit::new(&config, p).map(drop))?;
    weights.finish(&[])?;
    let initial = store.clone();
    let device = Device::flex().autodiff();
    let [
        mut difference,
        mut alignment,
        mut total,
        mut norm,
        mut used,
        mut next,
    ] = [const { Vec::new() }; 6];
    for k in 0..settings.steps {
        let (noisy, velocity, times) = noised(&settings, &inputs, &schedule, k)?;
        let text = dropped(&settings, &inputs, k)?;
        let tracked = store.tracked();
        let model = Emmdit::new(&config, &Params::new(&tracked, &device, Precision::F32))?;
        let output = model.forward_train(noisy, text, &times)?;
        let targets: Vec<Tensor<3>> = (0..output.projections.len())
            .map(|i| inputs.tensor(&target_name(&inputs, "zs", i)))
            .collect::<Result<_>>()?;
        let (mse, cosine) = losses(output, velocity, &targets, config.patch_size);
        difference.extend(values(mse.clone())?);
        let mut loss = mse;
        if let Some(cosine) = cosine {
            alignment.extend(values(cosine.clone())?);
            loss = loss + cosine * settings.proj_coeff;
        }
        total.extend(values(loss.clone())?);
        let gradients = named_gradients(&tracked, &store, loss.backward());
        let lr = rate(k as u64);
        let update = k as u64 + 1;
        let (clip, ema) = (settings.gradient_clip, settings.ema_rate);
        let done = step(&mut store, &gradients, &optimizer, lr, update, clip, ema)?;
        norm.push(done.grad_norm as f32);
        used.push(lr as f32);
        next.push(rate(update) as f32);
    }
    for (name, found) in [
        ("diff_loss", difference),
        ("proj_loss", alignment),
        ("loss", total),
        ("grad_norm", norm),
        ("lr_used", used),
        ("lr_logged_after", next),
    ] {
        if outputs.has(name) {
            outputs.close(report, name, &found, tolerance)?;
        }
    }
    outputs.finish(report);

    compare(case, report, &initial, &store, "params", |entry| {
        &entry.value
    })?;
    compare(case, report, &initial, &store, "ema", |entry| &entry.ema)
}

/// Noisy latents, the velocity between them and the noise, and the times of step `k`.
fn noised(
    settings: &Settings,
    inputs: &Tensors,
    schedule: &FlowMatchEuler,
    k: usize,
) -> Result<(Tensor<4>, Tensor<4>, Vec<f32>)> {
    let shape = inputs.get("image_latents")?.shape.clone();
    let scale = settings.scaling_factor as f32;
    let latents: Vec<f32> = inputs
        .f32s("image_latents")?
        .iter()
        .map(|z| z * scale)
        .collect();
    let noise = inputs.f32s(&format!("step.{k}.noise"))?;
    let size = latents.len() / shape[0];
    let (mut noisy, mut times) = (Vec::new(), Vec::new());
    for (i, &index) in settings.indices[k].iter().enumerate() {
        let sample = i * size..(i + 1) * size;
        let timestep = schedule.timesteps()[index];
        let sigma = schedule.sigma_of(timestep)?;
        noisy.extend(add_noise(&latents[sample.clone()], &noise[sample], sigma)?);
        times.push(timestep);
    }
    let velocity = noise.iter().zip(&latents).map(|(n, z)| n - z).collect();
    let tensor = |values: Vec<f32>| {
        Tensor::from_data(TensorData::new(values, shape.clone()), &Device::flex())
    };
    Ok((tensor(noisy), tensor(velocity), times))
}

/// The text features of step `k`, those of dropped captions replaced by the empty caption's.
fn dropped(settings: &Settings, inputs: &Tensors, k: usize) -> Result<Tensor<3>> {
    let text: Tensor<3> = inputs.tensor(&format!("step.{k}.txt_emb"))?;
    let empty: Tensor<3> = inputs.tensor("uncond_prompt_embeds")?;
    let rows = settings.drop_mask[k]
        .iter()
        .enumerate()
        .map(|(i, &drop)| match drop {
            true => empty.clone(),
            false => text.clone().slice_dim(0, i..i + 1),
        });
    Ok(Tensor::cat(rows.collect(), 0))
}

/// Compares each parameter, and how far all of them together have moved: in a few steps that is so
/// little that the parameters themselves would hide a missing update.
fn compare(
    case: &Case,
    report: &mut Report,
    initial: &ParameterStore,
    store: &ParameterStore,
    key: &str,
    pick: impl Fn(&nitro_train::store::Entry) -> &Vec<f32>,
) -> Result<()> {
    let expected = case.tensors(key)?;
    let tolerance = case.rel_l2()?;
    let (mut found_move, mut expected_move) = (Vec::new(), Vec::new());
    for (name, entry) in store.iter().filter(|(_, entry)| entry.trainable) {
        let want = expected.f32s(name)?;
        report.at_most(
            &format!("{key} {name}"),
            rel_l2(pick(entry), &want),
            tolerance,
        );
        let start = initial
            .get(name)
            .map(|entry| entry.value.clone())
            .unwrap_or_default();
        found_move.extend(pick(entry).iter().zip(&start).map(|(a, b)| a - b));
        expected_move.extend(want.iter().zip(&start).map(|(a, b)| a - b));
    }
    let tolerance = case.get(&format!("/tolerance/{key}_minus_init_rel_l2"))?;
    report.close(
        &format!("{key} - initial"),
        &found_move,
        &expected_move,
        tolerance,
    );
    expected.finish(report);
    Ok(())
}
