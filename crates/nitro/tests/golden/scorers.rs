//! The scorers' models, tokenizers and pictures: CLIP and HPSv2, ImageReward, Mask2Former.

use anyhow::{Context, Result};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use image::RgbImage;
use nitro_eval::pixels::{
    Antialias, CLIP_MEAN, CLIP_STD, Planes, clip_pixels, fit_square, hps_pixels,
};
use nitro_eval::scorers::Hps;
use nitro_eval::tokens::{BertTokenizer, ClipTokenizer};
use nitro_models::Params;
use nitro_models::blip::{ImageReward, ImageRewardConfig};
use nitro_models::clip::{Clip, ClipConfig, normalize};
use nitro_models::mask2former::{Mask2Former, Mask2FormerConfig};
use nitro_ops::Precision;
use serde::Deserialize;
use serde_json::json;

use crate::compare::Report;
use crate::files::{Case, Tensors, values};

/// Suite `clip_hps`.
pub(crate) fn clip_hps(case: &Case, report: &mut Report) -> Result<()> {
    if case.dir.join("prompts.json").is_file() {
        return clip_tokens(case, report);
    }
    if case.json["inputs"].get("files").is_some() {
        return hps_scores(case, report);
    }
    let config: ClipConfig = case.get("/config")?;
    let device = Device::flex();
    let weights = case.weights()?;
    let clip = Clip::new(&config, &Params::new(&weights, &device, Precision::F32))?;
    weights.finish(&[])?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let mut seen: Vec<(String, Vec<f32>)> = Vec::new();
    let mut stages: Vec<(String, Tensor<3>)> = Vec::new();
    let mut observe = |name: &str, x: Tensor<3>| stages.push((name.to_owned(), x));
    let image = clip.encode_image_observed(inputs.tensor("image")?, &mut observe)?;
    let text = clip.encode_text_observed(ids(&inputs, "text", &device)?, &mut observe)?;
    for (name, x) in stages {
        seen.push((name, values(x)?));
    }
    seen.push(("image_features_raw".to_owned(), values(image.clone())?));
    seen.push(("text_features_raw".to_owned(), values(text.clone())?));
    let (image, text) = (normalize(image), normalize(text));
    let similar = image.clone().matmul(text.clone().transpose());
    let scale = values(clip.logit_scale())?;
    let unscaled = values(similar.clone())?;
    let count = image.dims()[0];
    seen.push((
        "hps_score".to_owned(),
        (0..count).map(|i| unscaled[i * count + i]).collect(),
    ));
    let scaled = unscaled.iter().map(|x| x * scale[0]).collect();
    seen.push(("logits_per_image".to_owned(), scaled));
    seen.push(("logits_per_image_unscaled".to_owned(), unscaled));
    seen.push(("logit_scale_exp".to_owned(), scale));
    seen.push(("image_features".to_owned(), values(image)?));
    seen.push(("text_features".to_owned(), values(text)?));
    compare(report, &outputs, seen, tolerance)
}

/// From picture files and texts to HPSv2's scores.
fn hps_scores(case: &Case, report: &mut Report) -> Result<()> {
    let config: ClipConfig = case.get("/config")?;
    let device = Device::flex();
    let weights = case.weights()?;
    let params = Params::new(&weights, &device, Precision::F32);
    let clip = Clip::new(&config, &params)?;
    let hps = Hps::new(&config, &params)?;
    weights.finish(&[])?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let files: Vec<String> = case.get("/inputs/files")?;
    let texts: Vec<String> = case.get("/inputs/texts")?;
    let side = config.vision_cfg.image_size;
    let tokenizer = ClipTokenizer::new();
    let length = config.text_cfg.context_length;
    let tokens: Vec<i64> = texts
        .iter()
        .flat_map(|text| tokenizer.encode(text, length))
        .map(i64::from)
        .collect();
    report.equal("token_ids", &tokens, &inputs.i64s("token_ids")?);

    let mut seen: Vec<(String, Vec<f32>)> = Vec::new();
    let mut images = Vec::new();
    for (file, ids) in files.iter().zip(tokens.chunks_exact(length)) {
        let image = open(&case.dir.join(file))?;
        let planes = hps_pixels(&image, side);
        let old = fit_square(&Planes::of(&image), side, Antialias::Off);
        let old = old.normalize(CLIP_MEAN, CLIP_STD);
        let pixels = TensorData::new(planes.values.clone(), [1, 3, side, side]);
        let features = clip.encode_image(Tensor::from_data(pixels, &device))?;
        let ids = TensorData::new(ids.to_vec(), [1, length]);
        let text = clip.encode_text(Tensor::from_data(ids, &device))?;
        let named = [
            ("pixels", planes.values),
            ("pixels_no_antialias", old.values),
            (
                "pixels_open_clip_val",
                clip_pixels(&image, side as u32).values,
            ),
            ("image_features", values(normalize(features))?),
            ("text_features", values(normalize(text))?),
        ];
        seen.extend(named.map(|(name, x)| (format!("{file}.{name}"), x)));
        let large = hps_pixels(&image, 224).values;
        let fourth = |i: &usize| (i % 224).is_multiple_of(4) && (i / 224 % 224).is_multiple_of(4);
        let sparse = (0..large.len()).filter(fourth).map(|i| large[i]).collect();
        seen.push((format!("{file}.pixels_224"), sparse));
        images.push(image);
    }
    let pairs: Vec<(&RgbImage, &str)> = images
        .iter()
        .zip(texts.iter().map(String::as_str))
        .collect();
    seen.push(("hps_scores".to_owned(), hps.score(&pairs)?));
    compare(report, &outputs, seen, tolerance)
}

/// A line of a tokenizer's `prompts.json`.
#[derive(Deserialize)]
struct Prompt {
    text: String,
}

fn prompts(case: &Case) -> Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(case.dir.join("prompts.json"))?;
    Ok(serde_json::from_str(&text)?)
}

fn clip_tokens(case: &Case, report: &mut Report) -> Result<()> {
    let length: usize = case.get("/config/context_length")?;
    let outputs = case.tensors("outputs")?;
    let tokenizer = ClipTokenizer::new();
    let (ids, open_clip) = (outputs.i64s("ids")?, outputs.i64s("ids_open_clip")?);
    let rows = ids.chunks_exact(length).zip(open_clip.chunks_exact(length));
    for (prompt, (expected, also)) in prompts(case)?.iter().zip(rows) {
        let found: Vec<i64> = tokenizer
            .encode(&prompt.text, length)
            .into_iter()
            .map(i64::from)
            .collect();
        report.equal(&format!("{:?}", prompt.text), &found, &expected.to_vec());
        report.equal(
            &format!("{:?} (open_clip)", prompt.text),
            &found,
            &also.to_vec(),
        );
    }
    outputs.finish(report);
    Ok(())
}

/// Suite `image_reward`.
pub(crate) fn image_reward(case: &Case, report: &mut Report) -> Result<()> {
    if case.dir.join("prompts.json").is_file() {
        return bert_tokens(case, report);
    }
    let config: ImageRewardConfig = case.get("/config")?;
    let device = Device::flex();
    let weights = case.weights()?;
    let model = ImageReward::new(&config, &Params::new(&weights, &device, Precision::F32))?;
    weights.finish(&ImageReward::UNUSED)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let mask = inputs.get("attention_mask")?.shape.clone();
    let seen_tokens: Vec<bool> = inputs
        .i64s("attention_mask")?
        .iter()
        .map(|m| *m != 0)
        .collect();
    let mask = Tensor::<2, Bool>::from_data(TensorData::new(seen_tokens, mask), &device);
    let mut stages: Vec<(String, Tensor<3>)> = Vec::new();
    let reward = model.forward_observed(
        inputs.tensor("pixel_values")?,
        ids(&inputs, "input_ids", &device)?,
        mask,
        &mut |name, x| stages.push((name.to_owned(), x)),
    )?;
    let last = format!("text_hidden.{}", config.med_config.num_hidden_layers);
    let mut seen: Vec<(String, Vec<f32>)> = Vec::new();
    for (name, x) in stages {
        if name == last {
            seen.push(("text_last_hidden_state".to_owned(), values(x.clone())?));
        }
        seen.push((name, values(x)?));
    }
    seen.push(("reward".to_owned(), values(reward)?));
    compare(report, &outputs, seen, case.rel_l2()?)
}

fn bert_tokens(case: &Case, report: &mut Report) -> Result<()> {
    let length: usize = case.get("/config/max_length")?;
    let outputs = case.tensors("outputs")?;
    let tokenizer = BertTokenizer::new()?;
    let (ids, masks) = (outputs.i64s("input_ids")?, outputs.i64s("attention_mask")?);
    let rows = ids.chunks_exact(length).zip(masks.chunks_exact(length));
    for (prompt, (expected, mask)) in prompts(case)?.iter().zip(rows) {
        let (found, used) = tokenizer.encode(&prompt.text, length)?;
        let found: Vec<i64> = found.into_iter().map(i64::from).collect();
        report.equal(&format!("{:?}", prompt.text), &found, &expected.to_vec());
        let wanted = mask.iter().filter(|m| **m != 0).count();
        report.equal(&format!("{:?} length", prompt.text), &used, &wanted);
    }
    outputs.finish(report);
    Ok(())
}

/// Suite `mask2former`.
pub(crate) fn mask2former(case: &Case, report: &mut Report) -> Result<()> {
    let mut config = case.json["config"]["model"].clone();
    config["backbone_config"] = case.json["config"]["backbone"].clone();
    let config: Mask2FormerConfig = serde_json::from_value(json!(config))?;
    let weights = case.weights()?;
    let params = Params::new(&weights, &Device::flex(), Precision::F32);
    let model = Mask2Former::new(&config, &params)?;
    weights.finish(&Mask2Former::UNUSED)?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let mut seen: Vec<(String, Vec<f32>)> = Vec::new();
    for (input, prefix) in [("pixel_values", ""), ("pixel_values_odd", "odd.")] {
        if !inputs.has(input) {
            continue;
        }
        let mut stages: Vec<(String, Tensor<4>)> = Vec::new();
        let pixels = inputs.tensor(input)?;
        let found =
            model.forward_observed(pixels, &mut |name, x| stages.push((name.to_owned(), x)))?;
        for (name, x) in stages {
            seen.push((format!("{prefix}{name}"), values(x)?));
        }
        seen.push((
            format!("{prefix}class_queries_logits"),
            values(found.classes)?,
        ));
        seen.push((
            format!("{prefix}masks_queries_logits"),
            values(found.masks)?,
        ));
    }
    compare(report, &outputs, seen, case.rel_l2()?)
}

/// Compares what the file has of the results seen; all of the file must be among them.
fn compare(
    report: &mut Report,
    outputs: &Tensors,
    seen: Vec<(String, Vec<f32>)>,
    tolerance: f64,
) -> Result<()> {
    for (name, found) in seen.iter().filter(|(name, _)| outputs.has(name)) {
        report.close(name, found, &outputs.f32s(name)?, tolerance);
    }
    outputs.finish(report);
    Ok(())
}

fn ids(inputs: &Tensors, name: &str, device: &Device) -> Result<Tensor<2, Int>> {
    let data = TensorData::new(inputs.i64s(name)?, inputs.get(name)?.shape.clone());
    Ok(Tensor::from_data(data, device))
}

pub(crate) fn open(path: &std::path::Path) -> Result<RgbImage> {
    Ok(image::open(path)
        .with_context(|| path.display().to_string())?
        .into_rgb8())
}
