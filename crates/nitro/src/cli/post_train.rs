//! `nitro train lora|grpo|distill`: training on from a model.

use std::path::{Path, PathBuf};

use clap::Args;
use nitro::card::CARD_FILE;
use nitro_train::config::RunConfig;
use nitro_train::miniature;
use nitro_train::trainer::RunOptions;

use super::failure::{bad_input, say};
use super::train::CommonArgs;

/// Names of the configurations that are taken if none is given.
const LORA: &str = "lora";
pub(super) const GRPO: &str = "grpo-miniature";
pub(super) const DISTILL: &str = "distill-miniature";

/// Arguments of `nitro train lora`.
#[derive(Args)]
pub(super) struct LoraArgs {
    /// Folder of pictures (png, jpg, webp), each with its caption in a .txt file of the same name
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder for the adapter, in PEFT's layout
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A word that is put before every caption
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
    #[command(flatten)]
    run: RunArgs,
}

/// Arguments of `nitro train grpo` and `nitro train distill`.
#[derive(Args)]
pub(super) struct VariantArgs {
    /// Model folder that gets the new variant [default: the model's own folder]
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
}

/// What these commands share.
#[derive(Args)]
struct RunArgs {
    /// The run's configuration [default: the miniature's, built in]
    #[arg(long, value_name = "FILE.yaml")]
    config: Option<PathBuf>,
    /// Model folder or Hub name to train on from [default: the configuration's]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Folder for checkpoints, samples and metrics.jsonl; the same command goes on from there
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Overrides of the configuration, such as run.max_steps=1000
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    #[command(flatten)]
    common: CommonArgs,
}

impl LoraArgs {
    pub(super) fn common(&self) -> &CommonArgs {
        &self.run.common
    }
}

impl VariantArgs {
    pub(super) fn common(&self) -> &CommonArgs {
        &self.run.common
    }
}

impl RunArgs {
    /// The configuration: the file's or the shipped one of the name `default`, under `more` overrides and
    /// then the user's.
    fn load(&self, default: &str, mut more: Vec<String>) -> anyhow::Result<RunConfig> {
        more.extend(self.model.iter().map(|model| set("task.model", model)));
        more.extend(self.overrides.iter().cloned());
        Ok(match &self.config {
            Some(path) => RunConfig::load(path, &more)?,
            None => RunConfig::shipped(default, &more)?,
        })
    }

    fn dir(&self, default: impl Into<PathBuf>) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| default.into())
    }
}

/// An override whose value is a string.
pub(super) fn set(key: &str, value: impl std::fmt::Display) -> String {
    format!("{key}={}", serde_json::Value::from(value.to_string()))
}

/// Runs `nitro train lora`.
pub(super) fn lora(args: &LoraArgs, options: &RunOptions) -> anyhow::Result<()> {
    if !args.data.is_dir() {
        return Err(bad_input(format!(
            "--data {}: there is no such folder",
            args.data.display()
        )));
    }
    let mut more = vec![set("task.data", args.data.display())];
    more.extend(args.trigger.iter().map(|word| set("task.trigger", word)));
    let config = args.run.load(LORA, more)?;
    let dir = args.run.dir(args.out.join("training"));
    miniature::run(&config, &dir, &args.out, options)?;
    say(format!("{}: use it with --lora {0}", args.out.display()));
    Ok(())
}

/// Runs `nitro train grpo`.
pub(super) fn grpo(args: &VariantArgs, options: &RunOptions) -> anyhow::Result<()> {
    variant(args, GRPO, "grpo", options)
}

/// Runs `nitro train distill`.
pub(super) fn distill(args: &VariantArgs, options: &RunOptions) -> anyhow::Result<()> {
    variant(args, DISTILL, "dist", options)
}

fn variant(
    args: &VariantArgs,
    default: &str,
    name: &str,
    options: &RunOptions,
) -> anyhow::Result<()> {
    let config = args.run.load(default, Vec::new())?;
    let model = serde_json::to_value(&config.task)?["model"].clone();
    let model = model.as_str().unwrap_or_default().to_owned();
    let export = match &args.export {
        Some(folder) => folder.clone(),
        None if Path::new(&model).is_dir() => PathBuf::from(&model),
        None => {
            return Err(bad_input(format!(
                "{model} is no folder: name one for the new variant with --export"
            )));
        }
    };
    let dir = args.run.dir(format!("runs/{name}"));
    miniature::run(&config, &dir, &export, options)?;
    if !export.join(CARD_FILE).exists() {
        say(format!(
            "{}: written; it has no {CARD_FILE}, so it is no model folder yet",
            export.display()
        ));
        return Ok(());
    }
    say(format!(
        "variant `{name}` is in {0}: nitro generate --model {0} --variant {name} \"...\"",
        export.display()
    ));
    Ok(())
}
