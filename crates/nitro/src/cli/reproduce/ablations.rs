//! `nitro reproduce ablations`: the paper's design choices, one left out at a time.

use std::path::PathBuf;

use clap::Args;
use nitro_train::ablations;
use nitro_train::config::RunConfig;
use nitro_train::trainer::RunOptions;

use crate::cli::failure::say;
use crate::cli::interrupt;

/// Arguments of `nitro reproduce ablations`.
#[derive(Args)]
pub(in crate::cli) struct AblationsArgs {
    /// Configuration that the arms start from
    #[arg(
        long,
        default_value = "configs/miniature-stage1.yaml",
        value_name = "FILE"
    )]
    config: PathBuf,
    /// Overrides of the configuration, for every arm
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Steps of each arm
    #[arg(long, default_value_t = 6000, value_name = "N")]
    steps: u64,
    /// Only this arm (repeatable): the others' runs may go on elsewhere, and the command without it makes the
    /// table of all
    #[arg(long, value_name = "NAME", value_parser = ablations::ARMS.map(|arm| arm.name))]
    arm: Vec<String>,
    /// Folder for the arms' runs, ablations.md and ablations.json
    #[arg(long, default_value = "runs/ablations", value_name = "DIR")]
    out: PathBuf,
    /// No progress bar
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the command.
pub(super) fn run(args: &AblationsArgs) -> anyhow::Result<()> {
    interrupt::install();
    let options = RunOptions {
        quiet: args.quiet,
        stop: Some(interrupt::flag()),
        ..RunOptions::default()
    };
    let quiet = args.quiet;
    let tell = |arm: &ablations::Arm| {
        if !quiet {
            eprintln!("{}: changed: {}", arm.name, arm.change);
        }
    };
    let wanted =
        |arm: &ablations::Arm| args.arm.is_empty() || args.arm.iter().any(|a| a == arm.name);
    let mut arms = ablations::ARMS.to_vec();
    arms.retain(wanted);
    let work = || -> anyhow::Result<String> {
        let base = RunConfig::load(&args.config, &args.overrides)?;
        Ok(ablations::run(
            &base, &arms, args.steps, &args.out, &options, tell,
        )?)
    };
    let table = interrupt::watched(|| nitro_train::in_pool(work))?;
    say(table);
    Ok(())
}
