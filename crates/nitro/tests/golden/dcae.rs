//! DC-AE: encoding and decoding with all intermediate results, and gradients of a reconstruction.

use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::dcae::{Dcae, DcaeConfig};
use nitro_models::{FormulaWeights, ParameterSource, Params, TensorMap};
use nitro_ops::Precision;

use crate::compare::Report;
use crate::files::{Case, values};

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    if case.json["tolerance"].get("grads_rel_l2").is_some() {
        gradients(case, report)
    } else {
        forward(case, report)
    }
}

fn forward(case: &Case, report: &mut Report) -> Result<()> {
    let config: DcaeConfig = case.get("/config")?;
    let weights = case.weights()?;
    let device = Device::flex();
    let params = Params::new(&weights, &device, Precision::F32);
    let model = Dcae::new(&config, &params)?;
    let packed = Dcae::new(&config, &params.for_inference())?;
    weights.finish(&[])?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let tags: Vec<&str> = inputs
        .names()
        .filter_map(|name| name.strip_prefix("x_"))
        .collect();
    if tags.is_empty() {
        bail!("the inputs have no image `x_<tag>`");
    }
    for tag in tags {
        let mut seen: Vec<(String, Tensor<4>)> = Vec::new();
        let latent = model.encoder.encode_observed(
            inputs.tensor(&format!("x_{tag}"))?,
            &mut |name, x| {
                seen.push((format!("{tag}.enc.{name}"), x.permute([0, 3, 1, 2])));
            },
        )?;
        let z: Tensor<4> = inputs.tensor(&format!("z_{tag}"))?;
        let decoded = model.decoder.decode_observed(z.clone(), &mut |name, x| {
            let name = match name {
                "conv_in" => "conv_in_plain",
                other => other,
            };
            seen.push((format!("{tag}.dec.{name}"), x.permute([0, 3, 1, 2])));
        })?;
        seen.push((format!("{tag}.latent"), latent.clone()));
        seen.push((format!("{tag}.decoded"), decoded));
        seen.push((format!("{tag}.reconstruction"), model.decode(latent)?));
        let unscaled = model.decode(z / config.scaling_factor)?;
        seen.push((format!("{tag}.decoded_from_scaled"), unscaled));
        // As it is when it paints: with packed weights, fine stages in bands.
        let latent = packed.encode(inputs.tensor(&format!("x_{tag}"))?)?;
        seen.push((format!("{tag}.latent"), latent.clone()));
        seen.push((format!("{tag}.reconstruction"), packed.decode(latent)?));
        for (name, value) in seen.into_iter().filter(|(name, _)| outputs.has(name)) {
            outputs.close(report, &name, &values(value)?, tolerance)?;
        }
    }
    outputs.finish(report);
    Ok(())
}

/// Mean squared reconstruction error: its value, every gradient, and its value one step later.
fn gradients(case: &Case, report: &mut Report) -> Result<()> {
    let config: DcaeConfig = case.get("/config")?;
    let weights = case.weights()?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let grads_tolerance: f64 = case.get("/tolerance/grads_rel_l2")?;
    let rate: f32 = case.get("/inputs/sgd_lr")?;
    let x: Tensor<4> = inputs.tensor("x")?;

    let plain = Device::flex();
    let parameters = TensorMap::collect(&weights, &plain, |p| Dcae::new(&config, p).map(drop))?;
    weights.finish(&[])?;
    let tracked = parameters.map(|_, tensor| tensor.autodiff().require_grad());
    let device = plain.clone().autodiff();
    let [latent, decoded] = reconstruct(&config, &tracked, &device, x.clone())?;
    outputs.close(report, "latent", &values(latent)?, tolerance)?;
    outputs.close(report, "decoded", &values(decoded.clone())?, tolerance)?;
    let loss = mean_squared(decoded, x.clone().autodiff());
    outputs.close(report, "loss", &values(loss.clone())?, tolerance)?;

    let grads = loss.backward();
    let expected = case.tensors("grads")?;
    let mut stepped = TensorMap::default();
    for (spec, tensor) in tracked.iter() {
        let name = &spec.name;
        let Some(grad) = tensor.grad(&grads) else {
            report.failure(&format!("grad {name}"), "there is none".to_owned());
            continue;
        };
        let grad = values(grad)?;
        report.close(
            &format!("grad {name}"),
            &grad,
            &expected.f32s(name)?,
            grads_tolerance,
        );
        let mut value = values(tensor.clone())?;
        value
            .iter_mut()
            .zip(grad)
            .for_each(|(value, grad)| *value -= rate * grad);
        let count = value.len();
        let value = Tensor::from_data(TensorData::new(value, [count]), &plain);
        stepped.insert(spec.clone(), value);
    }
    expected.finish(report);

    let [_, decoded] = reconstruct(&config, &stepped, &plain, x.clone())?;
    let after = values(mean_squared(decoded, x))?;
    outputs.close(report, "loss_after_sgd", &after, tolerance)?;
    outputs.finish(report);
    Ok(())
}

fn reconstruct(
    config: &DcaeConfig,
    weights: &dyn ParameterSource,
    device: &Device,
    x: Tensor<4>,
) -> Result<[Tensor<4>; 2]> {
    let model = Dcae::new(config, &Params::new(weights, device, Precision::F32))?;
    let x = if device == &Device::flex() {
        x
    } else {
        x.autodiff()
    };
    let latent = model.encode(x)?;
    let decoded = model.decode(latent.clone())?;
    Ok([latent, decoded])
}

fn mean_squared(a: Tensor<4>, b: Tensor<4>) -> Tensor<1> {
    (a - b).powi_scalar(2).mean()
}

/// Decoding a given latent, and encoding an image that is made here.
pub(crate) fn full_size(
    case: &Case,
    report: &mut Report,
    (params, weights): (&Params<'_>, &FormulaWeights),
    precision: &str,
    tolerance: f64,
) -> Result<()> {
    let config: DcaeConfig = case.get("/config")?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let model = Dcae::new(&config, params)?;

    let begun = Instant::now();
    let image = model.decode(inputs.tensor("latent")?)?;
    let [_, channels, height, width] = image.dims();
    let image = values(image)?;
    println!(
        "  {precision} decode: {:.2} s",
        begun.elapsed().as_secs_f64()
    );
    // Every second pixel in each direction is stored.
    let half: Vec<f32> = (0..channels * height * width)
        .filter(|i| (i / width) % 2 == 0 && (i % width) % 2 == 0)
        .map(|i| image[i])
        .collect();
    report.close(
        &format!("image ({precision})"),
        &half,
        &outputs.f32s("image_half")?,
        tolerance,
    );

    let image = TensorData::new(pixels(weights, image.len()), [1, channels, height, width]);
    let image = Tensor::from_data(image, params.device());
    let begun = Instant::now();
    let latent = values(model.encode(image)?)?;
    println!(
        "  {precision} encode: {:.2} s",
        begun.elapsed().as_secs_f64()
    );
    report.close(
        &format!("encoded ({precision})"),
        &latent,
        &outputs.f32s("encoded")?,
        tolerance,
    );
    outputs.finish(report);
    Ok(())
}

/// `0.5 * normal` clamped to -1 to 1, from the streams that the case's note names.
fn pixels(weights: &FormulaWeights, count: usize) -> Vec<f32> {
    let radii = weights.uniform("dcae.img.a", count).into_iter();
    let angles = weights.uniform("dcae.img.b", count);
    let normals = radii.zip(angles).map(|(radius, angle)| {
        let radius = (-2.0 * (1.0 - f64::from(radius) + 1e-12).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(angle)).cos()) as f32
    });
    normals
        .map(|normal| (0.5 * normal).clamp(-1.0, 1.0))
        .collect()
}
