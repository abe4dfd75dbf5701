//! Prompt to picture: token ids, text features, latents of every step, decoder input and output,
//! final pixels.

use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use nitro::{Event, ModelFiles, Pipeline, Request};
use nitro::{HubOptions, TextFeatures};
use serde_json::Value;

use crate::compare::Report;
use crate::files::{Case, Tensors, values};

/// `latents_probe` and `decoder_input_probe` keep every 64th value of each picture.
const PROBE_STRIDE: usize = 64;

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let tolerance = case.rel_l2()?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let pipeline = load(case)?;
    let request = request(case, &inputs)?;

    check_text(case, &pipeline, &request, report, &outputs)?;

    let pictures = request.pictures();
    let mut timesteps = Vec::new();
    let mut latents = Vec::new();
    let output = pipeline.generate_observed(&request, &mut |event| {
        if let Event::Step(step) = event {
            timesteps.push(step.sampler.timestep);
            latents.push(step.sampler.latents.to_vec());
        }
        ControlFlow::Continue(())
    })?;
    outputs.close(report, "timesteps", &timesteps, tolerance)?;
    let probes: Vec<f32> = latents
        .iter()
        .flat_map(|step| probe(step, pictures))
        .collect();
    outputs.close(report, "latents_probe", &probes, tolerance)?;
    for name in outputs
        .names()
        .filter(|name| name.starts_with("latents_after."))
    {
        let step: usize = name["latents_after.".len()..].parse()?;
        let found = latents
            .get(step)
            .with_context(|| format!("no step {step}"))?;
        outputs.close(report, name, found, tolerance)?;
    }

    let scale = pipeline.autoencoder().scaling_factor as f32;
    let decoder_input: Vec<f32> = output.latents.iter().map(|x| x / scale).collect();
    outputs.close(
        report,
        "decoder_input_probe",
        &probe(&decoder_input, pictures),
        tolerance,
    )?;
    let decoded = pipeline.decode_latents(&output.latents, pictures)?;
    let side = decoded.dims()[2];
    let middle = side / 2 - 16..side / 2 + 16;
    let crop = decoded
        .clone()
        .slice([0..pictures, 0..3, middle.clone(), middle]);
    outputs.close(report, "decoded.crop", &values(crop)?, tolerance)?;
    let end = side - 16..side;
    let corner = decoded.clone().slice([0..pictures, 0..3, end.clone(), end]);
    outputs.close(report, "decoded.corner", &values(corner)?, tolerance)?;
    let pooled = decoded
        .reshape([pictures * 3 * (side / 32), 32, side / 32, 32])
        .mean_dim(3)
        .mean_dim(1);
    outputs.close(report, "decoded.meanpool32", &values(pooled)?, tolerance)?;

    check_pictures(case, &output, report, &outputs)?;
    outputs.finish(report);
    Ok(())
}

/// The case's checkpoint and adapter, chosen by variant and resolution as a user would.
fn load(case: &Case) -> Result<Pipeline> {
    let folder = case.dir.join(case.get::<String>("/files/model_dir")?);
    let checkpoint: String = case.get("/inputs/checkpoint")?;
    let lora: Option<String> = case.get("/inputs/lora")?;
    let mut hub = HubOptions::from_env();
    hub.offline = true;
    let files = ModelFiles::open(folder.clone(), hub.clone())?;
    let known = files
        .card()
        .variants
        .iter()
        .find(|v| v.transformer == checkpoint && v.lora == lora)
        .with_context(|| format!("no variant has {checkpoint} with adapter {lora:?}"))?;
    let loaded = Pipeline::builder(folder)
        .hub(hub)
        .variant(&known.name)
        .resolution(case.get("/config/resolution")?)
        .load()?;
    ensure!(
        loaded.variant() == known,
        "another variant was loaded: {:?}",
        loaded.variant()
    );
    Ok(loaded)
}

fn request(case: &Case, inputs: &Tensors) -> Result<Request> {
    let texts = |pointer: &str| -> Result<Vec<String>> {
        Ok(match case.get::<Value>(pointer)? {
            Value::String(one) => vec![one],
            several => serde_json::from_value(several)?,
        })
    };
    Ok(Request {
        negative_prompts: texts("/inputs/negative_prompt")?,
        images_per_prompt: case.get("/inputs/num_images_per_prompt")?,
        latents: Some(inputs.f32s("latents")?),
        ..Request::of(texts("/inputs/prompts")?)
            .steps(case.get("/inputs/num_inference_steps")?)
            .guidance(case.get("/inputs/guidance_scale")?)
            .size(case.get("/config/resolution")?)
    })
}

fn check_text(
    case: &Case,
    pipeline: &Pipeline,
    request: &Request,
    report: &mut Report,
    outputs: &Tensors,
) -> Result<()> {
    let mut check = |what: &str, cleaned: &str, texts: &[&str]| -> Result<()> {
        let encoded = pipeline.encode_texts(texts, true)?;
        let expected: Vec<String> = case.get(&format!("/{cleaned}"))?;
        report.equal(cleaned, &encoded.texts, &expected);
        let TextFeatures {
            tokens, features, ..
        } = encoded;
        let ids: Vec<i64> = tokens
            .iter()
            .flat_map(|t| t.ids.iter().map(|id| i64::from(*id)))
            .collect();
        let name = format!("{what}.input_ids");
        report.equal(&name, &ids, &outputs.i64s(&name)?);
        let mask: Vec<i64> = tokens
            .iter()
            .flat_map(|t| t.mask().into_iter().map(i64::from))
            .collect();
        let name = format!("{what}.attention_mask");
        report.equal(&name, &mask, &outputs.i64s(&name)?);
        let name = match what {
            "prompt" => "prompt_embeds",
            _ => "negative_prompt_embeds",
        };
        outputs.close(report, name, &values(features)?, case.rel_l2()?)
    };
    let prompts: Vec<&str> = request.prompts.iter().map(String::as_str).collect();
    check("prompt", "cleaned_prompts", &prompts)?;
    if outputs.has("negative_prompt_embeds") {
        let negatives: Vec<&str> = match request.negative_prompts.as_slice() {
            [one] => vec![one; prompts.len()],
            several => several.iter().map(String::as_str).collect(),
        };
        check("negative", "cleaned_negative", &negatives)?;
    }
    Ok(())
}

fn probe(latents: &[f32], pictures: usize) -> Vec<f32> {
    latents
        .chunks(latents.len() / pictures)
        .flat_map(|picture| picture.iter().step_by(PROBE_STRIDE).copied())
        .collect()
}

fn check_pictures(
    case: &Case,
    output: &nitro::Output,
    report: &mut Report,
    outputs: &Tensors,
) -> Result<()> {
    let expected = outputs.get("image_u8.crop")?;
    let [_, height, width, 3] = expected.shape[..] else {
        anyhow::bail!("image_u8.crop has shape {:?}, not NHWC", expected.shape);
    };
    let found: Vec<u8> = output
        .images
        .iter()
        .flat_map(|generated| {
            let picture = &generated.image;
            let (left, top) = (
                (picture.width() - width as u32) / 2,
                (picture.height() - height as u32) / 2,
            );
            image::imageops::crop_imm(picture, left, top, width as u32, height as u32)
                .to_image()
                .into_raw()
        })
        .collect();
    compare_bytes(case, report, "image_u8.crop", &found, &expected.bytes)?;

    let files: Vec<String> = match case.json["files"].get("images") {
        Some(_) => case.get("/files/images")?,
        None => Vec::new(),
    };
    for (generated, file) in output.images.iter().zip(&files) {
        let expected = image::open(case.dir.join(file))?.into_rgb8();
        compare_bytes(
            case,
            report,
            file,
            generated.image.as_raw(),
            expected.as_raw(),
        )?;
    }
    Ok(())
}

/// A value may be off by the case's tolerance, and only in few places.
fn compare_bytes(
    case: &Case,
    report: &mut Report,
    name: &str,
    found: &[u8],
    expected: &[u8],
) -> Result<()> {
    if found.len() != expected.len() {
        let what = format!("{} bytes, expected {}", found.len(), expected.len());
        report.failure(name, what);
        return Ok(());
    }
    let differences = || found.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    let largest = differences().max().unwrap_or(0);
    let differing = differences().filter(|d| *d > 0).count() as f64 / found.len() as f64;
    report.at_most(
        &format!("{name}, largest difference"),
        f64::from(largest),
        case.get("/tolerance/u8_max_abs_diff")?,
    );
    report.at_most(
        &format!("{name}, share that differs"),
        differing,
        case.get("/tolerance/u8_fraction_differing")?,
    );
    Ok(())
}
