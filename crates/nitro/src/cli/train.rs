//! `nitro train`: runs from YAML files, and the miniature from nothing.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use nitro_models::DType;
use nitro_train::config::RunConfig;
use nitro_train::export::{Which, export_official};
use nitro_train::miniature::{self, LatentsPlan, Miniature};
use nitro_train::plan::plan;
use nitro_train::trainer::RunOptions;

use super::failure::say;
use super::{interrupt, post_train, ranks};

/// What to train.
#[derive(Subcommand)]
pub(super) enum TrainCommand {
    /// One run described by a YAML file; run again, it goes on from its newest checkpoint
    Run(RunArgs),
    /// Cache the training pairs of an E-MMDiT run: latents of rendered pictures, with captions
    Latents(LatentsArgs),
    /// Write an E-MMDiT run's newest weights as the official code loads them
    Export(ExportArgs),
    /// The whole miniature from nothing: autoencoder, text encoder, latents, teacher, E-MMDiT
    Miniature(MiniatureArgs),
    /// Adapters (LoRA) on a folder of your own pictures with captions
    #[command(long_flag = "lora")]
    Lora(post_train::LoraArgs),
    /// Improve a model by rewards (GRPO): gives the variant `grpo`
    Grpo(post_train::VariantArgs),
    /// Distil a model into one of few steps without guidance: gives the variant `dist`
    Distill(post_train::VariantArgs),
}

/// Arguments of `nitro train run`.
#[derive(Args)]
pub(super) struct RunArgs {
    /// The run's configuration
    #[arg(value_name = "CONFIG.yaml")]
    config: PathBuf,
    /// Overrides of the configuration, such as run.optimizer.lr=3e-4
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder for checkpoints, samples and metrics.jsonl
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    dir: Option<PathBuf>,
    /// Model folder that the trained part is written into at the end
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    export: Option<PathBuf>,
    /// Check configuration and data against each other, print what the run would be, and stop;
    /// writes nothing and loads no frozen model but REPA's
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    common: CommonArgs,
}

/// Arguments of `nitro train latents`.
#[derive(Args)]
pub(super) struct LatentsArgs {
    /// Model folder with the trained autoencoder in dc-ae/
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder for the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    common: CommonArgs,
}

/// Arguments of `nitro train export`.
#[derive(Args)]
pub(super) struct ExportArgs {
    /// The run's folder
    #[arg(value_name = "DIR")]
    run: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// The weights as the last step left them instead of their moving average
    #[arg(long)]
    raw: bool,
    /// Element type
    #[arg(long, value_enum, default_value_t = ExportType::F32)]
    dtype: ExportType,
}

/// Element types of an export.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ExportType {
    F32,
    F16,
    Bf16,
}

/// Arguments of `nitro train miniature`.
#[derive(Args)]
pub(super) struct MiniatureArgs {
    /// Folder with the miniature-*.yaml files; files that are not there come with the program
    #[arg(long, default_value = "configs", value_name = "DIR")]
    configs: PathBuf,
    /// Folder for the runs' checkpoints, samples and metrics
    #[arg(long, default_value = "runs/miniature", value_name = "DIR")]
    runs: PathBuf,
    /// Model folder to write; parts that are there already are not trained again
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct PlanArgs {
    /// Shards of 2048 training pairs
    #[arg(long, default_value_t = 48, value_name = "N")]
    shards: usize,
    /// Side of the rendered pictures
    #[arg(long, default_value_t = 128, value_name = "PIXELS")]
    image_size: usize,
    /// Seed of the pairs
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    latents_seed: u64,
}

impl PlanArgs {
    fn plan(&self) -> LatentsPlan {
        LatentsPlan {
            shards: self.shards,
            image_size: self.image_size,
            seed: self.latents_seed,
        }
    }
}

/// How a run talks.
#[derive(Args)]
pub(super) struct CommonArgs {
    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

impl CommonArgs {
    pub(super) fn options(&self) -> RunOptions {
        RunOptions {
            quiet: self.quiet || !ranks::is_first(),
            stop: Some(interrupt::flag()),
            comm: ranks::comm(),
        }
    }
}

/// Runs the command.
pub(super) fn run(command: &TrainCommand) -> anyhow::Result<()> {
    interrupt::install();
    if !matches!(command, TrainCommand::Export(_)) {
        ranks::join()?;
    }
    let work = || match command {
        TrainCommand::Run(args) => {
            let config = RunConfig::load(&args.config, &args.overrides)?;
            match (&args.dir, &args.export) {
                (Some(dir), Some(export)) if !args.dry_run => Ok(miniature::run(
                    &config,
                    dir,
                    export,
                    &args.common.options(),
                )?),
                _ => {
                    let plan = plan(&config, args.common.options().comm.size())?;
                    say(serde_json::to_string_pretty(&plan)?);
                    Ok(())
                }
            }
        }
        TrainCommand::Latents(args) => {
            let precision = nitro_ops::Precision::Bf16;
            let (model, plan, options) = (&args.model, args.plan.plan(), args.common.options());
            Ok(miniature::cache_latents(
                model, &args.out, plan, precision, &options,
            )?)
        }
        TrainCommand::Export(args) => {
            let which = if args.raw {
                Which::Raw
            } else {
                Which::Averaged
            };
            let dtype = match args.dtype {
                ExportType::F32 => DType::F32,
                ExportType::F16 => DType::F16,
                ExportType::Bf16 => DType::BF16,
            };
            let step = export_official(&args.run, &args.out, which, dtype)?;
            say(format!("{}: weights of step {step}", args.out.display()));
            Ok(())
        }
        TrainCommand::Miniature(args) => {
            let miniature = Miniature::load(&args.configs, args.plan.plan())?;
            Ok(miniature.train(&args.runs, &args.out, &args.common.options())?)
        }
        TrainCommand::Lora(args) => post_train::lora(args, &args.common().options()),
        TrainCommand::Grpo(args) => post_train::grpo(args, &args.common().options()),
        TrainCommand::Distill(args) => post_train::distill(args, &args.common().options()),
    };
    interrupt::watched(|| nitro_train::in_pool(work))
}
