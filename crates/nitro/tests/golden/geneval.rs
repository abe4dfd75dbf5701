//! GenEval: its rules, summary, colour classification, and what mmdet makes of the detector's logits.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use image::RgbImage;
use nitro_eval::geneval::{
    COLORS, Detections, Metadata, Options, Results, Summary, evaluate_image,
};
use nitro_eval::pixels::{Planes, clip_pixels};
use nitro_eval::scorers::{
    Background, Canvas, color_classifier, color_logits, instances, object_crop,
};
use serde_json::Value;

use crate::compare::Report;
use crate::files::Case;
use crate::scorers::open;

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let has = |file: &str| case.dir.join(file).is_file();
    if has("cases.json") {
        verdicts(case, report)
    } else if has("results.jsonl") {
        summary(case, report)
    } else if has("image.png") {
        colors(case, report)
    } else if case.json["config"].get("batch_input_shape").is_some() {
        postprocess(case, report)
    } else {
        bail!("a kind of case that is not known")
    }
}

fn json(case: &Case, file: &str) -> Result<Value> {
    let path = case.dir.join(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// The official verdict, reason and boxes of every case.
fn verdicts(case: &Case, report: &mut Report) -> Result<()> {
    let names: Vec<String> = case.get("/config/colors")?;
    let cases: Vec<Value> = serde_json::from_value(json(case, "cases.json")?)?;
    for one in &cases {
        let id = one["id"].as_str().unwrap_or_default();
        let metadata = Metadata::parse(&one["metadata"].to_string(), "cases.json")?;
        let options = options(&case.json["config"]["defaults"], &one["options"]);
        let detections: BTreeMap<String, Vec<[f32; 5]>> =
            serde_json::from_value(one["detections"].clone())?;
        let detections = Detections(detections.into_iter().collect());
        let (verdict, kept) =
            evaluate_image(&detections, &metadata, &options, |class, objects| {
                let best = |index: usize| {
                    let logits = one["color_logits"][class][index].as_array();
                    let row: Vec<f64> = logits
                        .into_iter()
                        .flatten()
                        .filter_map(Value::as_f64)
                        .collect();
                    let first = (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b });
                    names[first].clone()
                };
                Ok(objects.iter().map(|k| best(k.index)).collect())
            })?;
        let expected = &one["expected"];
        let correct = expected["correct"].as_bool().unwrap_or_default();
        report.equal(&format!("{id} correct"), &verdict.correct, &correct);
        let reason = expected["reason"].as_str().unwrap_or_default();
        report.equal(
            &format!("{id} reason"),
            &words(&verdict.reason),
            &words(reason),
        );
        let wanted: BTreeMap<String, Vec<[f32; 5]>> =
            serde_json::from_value(expected["kept"].clone())?;
        let kept: BTreeMap<String, Vec<[f32; 5]>> = kept
            .into_iter()
            .map(|(class, kept)| (class, kept.iter().map(|k| k.scored).collect()))
            .collect();
        report.equal(&format!("{id} kept"), &kept, &wanted);
    }
    Ok(())
}

/// A reason's lines as sets of words: where two relations hold, GenEval lists them in the arbitrary
/// order of a Python set.
fn words(reason: &str) -> Vec<BTreeSet<&str>> {
    reason
        .lines()
        .map(|line| line.split(' ').collect())
        .collect()
}

fn options(defaults: &Value, overrides: &Value) -> Options {
    let number = |key: &str| {
        overrides
            .get(key)
            .or(defaults.get(key))
            .and_then(Value::as_f64)
    };
    let base = Options::default();
    let float = |key: &str, default: f32| number(key).map_or(default, |v| v as f32);
    Options {
        threshold: float("threshold", base.threshold),
        counting_threshold: float("counting_threshold", base.counting_threshold),
        max_objects: number("max_objects").map_or(base.max_objects, |v| v as usize),
        max_overlap: float("max_overlap", base.max_overlap),
        position_threshold: float("position_threshold", base.position_threshold),
    }
}

/// The official summary's text and unrounded numbers.
fn summary(case: &Case, report: &mut Report) -> Result<()> {
    let results = Results::open(&case.dir.join("results.jsonl"))?;
    let summary = Summary::of(results.records());
    let expected = json(case, "expected.json")?;
    let tolerance: f64 = case.get("/tolerance/abs")?;
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let share = |part: usize, whole: usize| part as f64 / whole as f64;
    let numbers = [
        ("total_images", summary.images as f64),
        ("total_prompts", summary.prompts as f64),
        (
            "correct_images",
            share(summary.correct_images, summary.images),
        ),
        (
            "correct_prompts",
            share(summary.correct_prompts, summary.prompts),
        ),
        ("overall", summary.overall()),
    ];
    for (name, found) in numbers {
        report.at_most(name, (found - number(&expected[name])).abs(), tolerance);
    }
    for task in &summary.tasks {
        let wanted = number(&expected["tasks"][&task.tag]);
        report.at_most(&task.tag, (task.share() - wanted).abs(), tolerance);
    }
    let order: Vec<&str> = summary.tasks.iter().map(|t| t.tag.as_str()).collect();
    report.equal("task_order", &Value::from(order), &expected["task_order"]);
    let stdout = std::fs::read_to_string(case.dir.join("stdout.txt"))?;
    report.equal(
        "stdout",
        &summary.to_string().trim_end(),
        &stdout.trim_end(),
    );
    Ok(())
}

/// Crops, CLIP's pixels of them, and the zero-shot arithmetic with the case's stand-in encoder.
fn colors(case: &Case, report: &mut Report) -> Result<()> {
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let tolerance = case.rel_l2()?;
    let side: usize = case.get("/config/image_size")?;
    let image = open(&case.dir.join("image.png"))?;
    let bytes = |name: &str| -> Result<Vec<u8>> { Ok(inputs.get(name)?.bytes.clone()) };
    report.equal("image", &image.as_raw().clone(), &bytes("image")?);
    let boxes = inputs.f32s("boxes")?;
    let boxes: Vec<[f32; 4]> = boxes
        .chunks_exact(5)
        .map(|b| [b[0], b[1], b[2], b[3]])
        .collect();
    let masks: Vec<bool> = bytes("masks")?.iter().map(|m| *m != 0).collect();
    let masks: Vec<&[bool]> = masks.chunks_exact(masks.len() / boxes.len()).collect();

    let (grey, original) = (Background::Grey, Background::Original);
    let modes = [
        ("default", grey, true, true),
        ("no_mask", grey, false, true),
        ("bg_original", original, true, true),
        ("no_crop", grey, true, false),
    ];
    let classifier = classifier(case, report)?;
    let weights = case.weights()?.read("W")?.1;
    for (mode, background, masked, cut) in modes {
        let name = format!("{mode}.pixels");
        let count = outputs.get(&name)?.shape[0];
        let mut pixels = Vec::new();
        let mut found = Vec::new();
        let mut logits = Vec::new();
        for i in 0..count {
            let crop = object_crop(
                &image,
                cut.then_some(boxes[i]),
                masked.then_some(masks[i]),
                background,
            );
            compare_crop(report, case, &format!("{mode}.crop_u8.{i}"), &crop)?;
            let planes = clip_pixels(&crop, side as u32);
            let row = color_logits(&stand_in(&planes, &weights), &classifier);
            let best = (0..row.len()).fold(0, |a, b| if row[b] > row[a] { b } else { a });
            found.push(COLORS[best].to_owned());
            logits.extend(row);
            pixels.extend(planes.values);
        }
        report.close(&name, &pixels, &outputs.f32s(&name)?, tolerance);
        let expected: Vec<String> = case.get(&format!("/inputs/predicted_colors/{mode}"))?;
        report.equal(&format!("{mode} colours"), &found, &expected);
        if mode == "default" {
            report.close("logits", &logits, &outputs.f32s("logits")?, tolerance);
        }
    }
    Ok(())
}

fn compare_crop(report: &mut Report, case: &Case, name: &str, crop: &RgbImage) -> Result<()> {
    let outputs = case.tensors("outputs")?;
    if outputs.has(name) {
        let expected = outputs.get(name)?;
        let size = [crop.height() as usize, crop.width() as usize, 3];
        report.equal(&format!("{name} size"), &size.to_vec(), &expected.shape);
        report.equal(name, crop.as_raw(), &expected.bytes);
    }
    Ok(())
}

/// The classifier from the case's text features, compared with the case's.
fn classifier(case: &Case, report: &mut Report) -> Result<Vec<Vec<f32>>> {
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let shape = inputs.get("text_embeddings")?.shape.clone();
    let values = inputs.f32s("text_embeddings")?;
    let features: Vec<Vec<Vec<f32>>> = values
        .chunks_exact(shape[1] * shape[2])
        .map(|class| class.chunks_exact(shape[2]).map(<[f32]>::to_vec).collect())
        .collect();
    let classifier = color_classifier(&features);
    // The file has a column per class.
    let columns: Vec<f32> = (0..shape[2])
        .flat_map(|i| classifier.iter().map(move |class| class[i]))
        .collect();
    report.close(
        "classifier",
        &columns,
        &outputs.f32s("classifier")?,
        case.rel_l2()?,
    );
    Ok(classifier)
}

/// The stand-in for CLIP's picture tower: means of 4 x 4 regions times a matrix `[48, 16]`.
fn stand_in(planes: &Planes, weights: &[f32]) -> Vec<f32> {
    let (side, region) = (planes.width, planes.width / 4);
    let mean = |i: usize| {
        let (plane, y, x) = (i / 16, i % 16 / 4, i % 4);
        let row = |dy: usize| (plane * side + y * region + dy) * side + x * region;
        let sum: f32 = (0..region)
            .flat_map(|dy| &planes.values[row(dy)..][..region])
            .sum();
        sum / (region * region) as f32
    };
    let outputs = weights.len() / 48;
    (0..outputs)
        .map(|o| (0..48).map(|i| mean(i) * weights[i * outputs + o]).sum())
        .collect()
}

/// mmdet's objects from the last layer's logits.
fn postprocess(case: &Case, report: &mut Report) -> Result<()> {
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let labels: usize = case.get("/config/num_classes")?;
    let canvas = Canvas {
        padded: case.get("/config/batch_input_shape")?,
        resized: case.get("/config/img_shape")?,
        original: case.get("/config/ori_shape")?,
    };
    let size = inputs.get("mask_pred")?.shape.clone();
    let found = instances(
        &inputs.f32s("mask_cls")?,
        labels,
        &inputs.f32s("mask_pred")?,
        [size[2], size[3]],
        canvas,
        case.get("/config/max_per_image")?,
    );
    let of = |f: fn(&nitro_eval::scorers::Instance) -> Vec<u8>| {
        found.iter().flat_map(f).collect::<Vec<u8>>()
    };
    let found_labels: Vec<i64> = found.iter().map(|i| i.label as i64).collect();
    report.equal("labels", &found_labels, &outputs.i64s("labels")?);
    let boxes: Vec<f32> = found.iter().flat_map(|i| i.scored).collect();
    report.close("bboxes", &boxes, &outputs.f32s("bboxes")?, case.rel_l2()?);
    let masks = of(|i| i.mask.iter().map(|m| u8::from(*m)).collect());
    report.equal("masks", &masks, &outputs.get("masks")?.bytes);
    let counts: Vec<usize> = (0..labels)
        .map(|label| found.iter().filter(|i| i.label == label).count())
        .collect();
    report.equal(
        "per_class_counts",
        &counts,
        &case.get("/inputs/per_class_counts")?,
    );
    outputs.finish(report);
    Ok(())
}
