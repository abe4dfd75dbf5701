//! The seed's Table 2: base, GRPO and four-step model side by side.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use burn::tensor::Device;
use clap::{Args, ValueEnum};
use image::RgbImage;
use nitro::card::CARD_FILE;
use nitro::{HubOptions, ModelCard, ModelFiles, ModelInfo, ModelLocation, Pipeline, Request};
use nitro_eval::geneval::{prompt_folders, read_rgb};
use nitro_eval::scorers::{Hps, ScorerFiles};
use nitro_eval::shapes::{BenchPrompt, held_out_bench, shapes_bench};
use nitro_eval::{Metadata, Summary};
use nitro_ops::Precision;
use nitro_train::config::RunConfig;
use nitro_train::miniature;
use nitro_train::trainer::RunOptions;
use serde::Serialize;
use serde_json::json;

use super::super::eval::Bench;
use super::super::failure::{bad_input, say};
use super::super::interrupt;
use super::super::post_train::{DISTILL, GRPO, set};
use super::super::progress::Progress;

/// Arguments of `nitro reproduce table2`.
#[derive(Args)]
pub(in super::super) struct Table2Args {
    /// Model folder whose base variant everything starts from
    #[arg(long, default_value = "models/miniature", value_name = "DIR")]
    model: PathBuf,
    /// Folder for the runs, the model with its new variants, the pictures and the table
    #[arg(long, default_value = "runs/table2", value_name = "DIR")]
    runs: PathBuf,
    /// Whose pictures the four-step model learns from
    #[arg(long, value_enum, default_value_t = Teacher::Grpo)]
    teacher: Teacher,
    /// Preference model for a second GRPO run and a further column: a folder or Hub name, as `nitro train run
    /// configs/miniature-preference.yaml` makes one
    #[arg(long, value_name = "MODEL")]
    hps: Option<String>,
    /// Override of the GRPO configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    grpo: Vec<String>,
    /// Override of the configuration that GRPO goes on with, the preference model's score rewarded as well
    /// (repeatable)
    #[arg(long, value_name = "KEY=VALUE", requires = "hps")]
    grpo_hps: Vec<String>,
    /// Override of the distillation's configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    distill: Vec<String>,
    /// Score on every N-th prompt only
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    every: u16,
    /// Print errors and warnings only
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Teacher {
    Base,
    Grpo,
}

const VARIANTS: [&str; 3] = ["base", "grpo", "dist"];
/// Pictures in a batch when throughput is measured, as in the seed's table.
const BATCH: usize = 32;

/// One row.
#[derive(Serialize)]
struct Row {
    variant: &'static str,
    steps: usize,
    guidance: f64,
    parameters: usize,
    /// Denoising one picture.
    tflop: f64,
    /// Pictures per second in batches of 32, prompt to pixels.
    throughput: f64,
    /// Milliseconds for one picture, prompt to pixels.
    latency: f64,
    /// Of these in the transformer.
    latency_denoise: f64,
    tasks: Vec<(String, f64)>,
    overall: f64,
    /// On the held-out prompts.
    overall_held_out: f64,
    /// Mean score of the bench's pictures by the preference model, times 100.
    hps: Option<f64>,
}

/// Runs the command.
pub(super) fn run(args: &Table2Args) -> anyhow::Result<()> {
    interrupt::install();
    let model = args.runs.join("model");
    prepare(&args.model, &model)?;
    train(args, &model)?;

    let info = ModelInfo::read(&ModelFiles::open(
        ModelLocation::Folder(model.clone()),
        HubOptions::from_env(),
    )?)?;
    let progress = Progress::new(args.quiet);
    let hps = match &args.hps {
        Some(place) => {
            let files = ScorerFiles::new(place, HubOptions::from_env());
            Some(files.hps(&Device::flex(), Precision::F32)?.scorer)
        }
        None => None,
    };
    let mut rows = Vec::new();
    for variant in VARIANTS {
        let pipeline = Pipeline::builder(ModelLocation::Folder(model.clone()))
            .variant(variant)
            .precision(Precision::Bf16)
            .load()?;
        let score = |name: &str, prompts: Vec<BenchPrompt>| -> anyhow::Result<Summary> {
            let prompts: Vec<Metadata> = prompts
                .into_iter()
                .step_by(usize::from(args.every))
                .map(|p| p.metadata)
                .collect();
            let out = args.runs.join(format!("{name}-{variant}"));
            let bench = Bench {
                out: &out,
                steps: None,
                guidance: None,
                batch: BATCH,
            };
            bench.make(&pipeline, &prompts, &progress)?;
            bench.judge(&prompts, &progress)
        };
        let bench = score("bench", shapes_bench())?;
        let held_out = score("held-out", held_out_bench())?;
        progress.stage("measuring speed");
        let (throughput, latency, denoise) = speed(&pipeline)?;
        let known = info.variants.iter().find(|v| v.variant.name == variant);
        let known = known.context("the model's card has lost a variant")?;
        let passes = if known.variant.guidance > 1.0 { 2 } else { 1 };
        rows.push(Row {
            variant,
            steps: known.variant.steps,
            guidance: known.variant.guidance,
            parameters: known.part.parameters,
            tflop: known.part.gflop * (passes * known.variant.steps) as f64 / 1e3,
            throughput,
            latency: latency.as_secs_f64() * 1e3,
            latency_denoise: denoise.as_secs_f64() * 1e3,
            tasks: bench
                .tasks
                .iter()
                .map(|t| (t.tag.clone(), t.share()))
                .collect(),
            overall: bench.overall(),
            overall_held_out: held_out.overall(),
            hps: match &hps {
                Some(hps) => Some(preference(
                    hps,
                    &args.runs.join(format!("bench-{variant}")),
                )?),
                None => None,
            },
        });
    }
    progress.clear();
    let table = table(&rows);
    let write = |name: &str, text: &str| {
        let path = args.runs.join(name);
        nitro_files::write_bytes(&path, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    };
    write("table2.json", &serde_json::to_string_pretty(&rows)?)?;
    write("table2.md", &table)?;
    say(table);
    Ok(())
}

/// A copy of the model that has its base variant only.
fn prepare(from: &Path, to: &Path) -> anyhow::Result<()> {
    if to.join(CARD_FILE).exists() {
        return Ok(());
    }
    let path = from.join(CARD_FILE);
    let json = std::fs::read(&path).map_err(|e| {
        bad_input(format!(
            "{}: {e}; --model takes a folder with a model card",
            path.display()
        ))
    })?;
    let mut card = ModelCard::parse(&json, &path.display().to_string())?;
    let base = card.variant(Some("base"), None)?.clone();
    copy(&from.join(&base.transformer), &to.join(&base.transformer))?;
    copy(&from.join(&card.dc_ae), &to.join(&card.dc_ae))?;
    copy(&from.join(&card.text_encoder), &to.join(&card.text_encoder))?;
    card.variants = vec![base];
    // The card comes last: a folder that has one is whole.
    let text = serde_json::to_string_pretty(&card)?;
    Ok(nitro_files::write_bytes(
        &to.join(CARD_FILE),
        text.as_bytes(),
    )?)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let place = || format!("cannot copy {} to {}", from.display(), to.display());
    if from.is_dir() {
        std::fs::create_dir_all(to).with_context(place)?;
        for item in std::fs::read_dir(from).with_context(place)? {
            let item = item.with_context(place)?;
            copy(&item.path(), &to.join(item.file_name()))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).with_context(place)?;
    }
    std::fs::copy(from, to).map(drop).with_context(place)
}

/// Trains the variants that are missing.
fn train(args: &Table2Args, model: &Path) -> anyhow::Result<()> {
    let options = RunOptions {
        quiet: args.quiet,
        stop: Some(interrupt::flag()),
        ..RunOptions::default()
    };
    let place = model.display();
    let teacher = match args.teacher {
        Teacher::Base => "base",
        Teacher::Grpo => "grpo",
    };
    let run = |folder: &str, config: &str, overrides: Vec<String>| -> anyhow::Result<()> {
        let config = RunConfig::shipped(config, &overrides)?;
        let dir = args.runs.join(folder);
        let work = || miniature::run(&config, &dir, model, &options);
        Ok(interrupt::watched(|| nitro_train::in_pool(work))?)
    };
    let all = |own: Vec<String>, more: &[String]| [&own[..], more].concat();

    let json = std::fs::read(model.join(CARD_FILE)).context("the model's card")?;
    let card = ModelCard::parse(&json, CARD_FILE)?;
    let known = card.variant_names();
    if !known.contains(&"grpo") {
        let own = vec![set("task.model", &place)];
        run("grpo", GRPO, all(own, &args.grpo))?;
    }
    // A variant that came from elsewhere is taken as it is; one of ours goes on with both rewards.
    let first = args.runs.join("grpo");
    if let Some(hps) = args.hps.as_ref().filter(|_| first.is_dir()) {
        let mut own = both_rewards(hps)?;
        own.push(set("task.model", &place));
        own.push(set("run.init_from", first.display()));
        run("grpo-hps", GRPO, all(own, &args.grpo_hps))?;
    }
    if !known.contains(&"dist") {
        let own = vec![
            set("task.model", &place),
            set("task.variant", teacher),
            set("task.pairs.folder", args.runs.join("pairs").display()),
        ];
        run("dist", DISTILL, all(own, &args.distill))?;
    }
    Ok(())
}

/// How GRPO goes on with the preference model's score beside GenEval's rules, which do not see what is
/// painted in addition (`docs/post-training.md`).
fn both_rewards(hps: &str) -> anyhow::Result<Vec<String>> {
    let first = RunConfig::shipped(GRPO, &[])?;
    let mut rewards = serde_json::to_value(&first.task)?["rewards"].take();
    let hps = json!({ "name": "hps", "weight": 4.0, "scorer": { "kind": "hps", "model": hps } });
    rewards
        .as_array_mut()
        .context("the configuration of grpo has no list of rewards")?
        .push(hps);
    Ok(vec![
        "run.seed=1".into(),
        "run.max_steps=80".into(),
        "run.decay_steps=40".into(),
        format!("task.rewards={rewards}"),
    ])
}

/// Mean score of a bench folder's pictures, times 100 as HPSv2 gives it.
fn preference(hps: &Hps, folder: &Path) -> anyhow::Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for prompt in prompt_folders(folder)? {
        let mut pictures = Vec::new();
        for sample in &prompt.samples {
            let (rgb, width, height) = read_rgb(sample)?;
            pictures.extend(RgbImage::from_raw(width as u32, height as u32, rgb));
        }
        let text = prompt.metadata.prompt.as_str();
        let pairs: Vec<(&RgbImage, &str)> = pictures.iter().map(|p| (p, text)).collect();
        let scores = hps.score(&pairs)?;
        sum += scores.iter().map(|s| f64::from(*s)).sum::<f64>();
        count += scores.len();
    }
    Ok(100.0 * sum / count.max(1) as f64)
}

/// Pictures per second in batches; time for one picture, and of it in the transformer: the median of
/// five after a first one.
fn speed(pipeline: &Pipeline) -> anyhow::Result<(f64, Duration, Duration)> {
    let prompt = "a red circle left of a blue square";
    let mut times: Vec<(Duration, Duration)> = Vec::new();
    for _ in 0..6 {
        let begun = Instant::now();
        let output = pipeline.generate(&Request::new(prompt))?;
        times.push((begun.elapsed(), output.timings.denoise));
    }
    times.remove(0);
    times.sort();
    let (latency, denoise) = times[times.len() / 2];
    let many = Request {
        images_per_prompt: BATCH,
        batch: BATCH,
        ..Request::new(prompt)
    };
    let begun = Instant::now();
    pipeline.generate(&many)?;
    Ok((
        BATCH as f64 / begun.elapsed().as_secs_f64(),
        latency,
        denoise,
    ))
}

/// Rows of the seed's table: throughput and latency on an MI300X, GenEval's overall score and HPSv2.1
/// where they are published (AMD's blog and arXiv 2510.27135).
const SEED: [[&str; 6]; 3] = [
    ["Nitro-E 512 px base", "20", "18.83", "398", "0.66", "29.82"],
    ["Nitro-E 512 px GRPO", "20", "18.83", "398", "0.72", ""],
    ["Nitro-E 512 px dist", "4", "39.36", "99", "0.67", "30.18"],
];

fn table(rows: &[Row]) -> String {
    let mut text =
        String::from("| model | steps | parameters | TFLOP | pictures/s | ms | of it denoising |");
    let tags: Vec<&str> = rows
        .first()
        .map(|row| row.tasks.iter().map(|(tag, _)| tag.as_str()).collect())
        .unwrap_or_default();
    for tag in &tags {
        let _ = write!(text, " {tag} |");
    }
    text += " overall | held-out prompts | HPS |\n";
    text += &"| --- ".repeat(10 + tags.len());
    text += "|\n";
    for row in rows {
        let _ = write!(
            text,
            "| miniature {} | {} | {:.2}M | {:.4} | {:.2} | {:.0} | {:.0} |",
            row.variant,
            row.steps,
            row.parameters as f64 / 1e6,
            row.tflop,
            row.throughput,
            row.latency,
            row.latency_denoise,
        );
        for (_, share) in &row.tasks {
            let _ = write!(text, " {share:.2} |");
        }
        let hps = row.hps.map_or(String::new(), |hps| format!("{hps:.2}"));
        let (overall, other) = (row.overall, row.overall_held_out);
        let _ = writeln!(text, " {overall:.3} | {other:.3} | {hps} |");
    }
    for [name, steps, throughput, latency, overall, hps] in SEED {
        let gaps = " |".repeat(tags.len() + 1);
        let _ = writeln!(
            text,
            "| {name} (MI300X, as published) | {steps} | 304M | | {throughput} | {latency} |{gaps} \
             {overall} | | {hps} |"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_table_has_the_same_columns() {
        let row = |variant| Row {
            variant,
            steps: 20,
            guidance: 4.5,
            parameters: 7_100_000,
            tflop: 0.02,
            throughput: 3.0,
            latency: 400.0,
            latency_denoise: 300.0,
            tasks: vec![("position".into(), 0.5), ("counting".into(), 0.7)],
            overall: 0.6,
            overall_held_out: 0.61,
            hps: None,
        };
        let table = table(&[row("base"), row("grpo"), row("dist")]);
        let columns: Vec<usize> = table.lines().map(|l| l.matches('|').count()).collect();
        assert_eq!(columns, vec![13; 8], "{table}");
    }
}
