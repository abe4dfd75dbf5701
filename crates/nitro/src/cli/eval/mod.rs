//! `nitro eval`: one module per benchmark.

mod dpg;
mod geneval;
mod hps;
mod image_reward;
mod pictures;
mod scorer_args;
mod shapes;

use clap::{Args, Subcommand};

use super::ranks;

pub(super) use shapes::Bench;

/// Score a model on a benchmark.
#[derive(Args)]
pub(super) struct EvalCommand {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// The shapes bench: 240 prompts in GenEval's six tasks, four pictures each, judged exactly
    Shapes(Box<shapes::ShapesArgs>),
    /// GenEval: 553 prompts in six tasks, judged by Mask2Former and CLIP ViT-L/14
    Geneval(Box<geneval::GenEvalArgs>),
    /// HPSv2.1: which of two pictures people would prefer, in four styles of 800 prompts
    Hps(Box<hps::HpsArgs>),
    /// ImageReward: how much people would like the pictures for their prompts
    ImageReward(Box<image_reward::ImageRewardArgs>),
    /// DPG-Bench's pictures, for its own scorer: 1065 long prompts, four pictures each in one file
    Dpg(Box<dpg::DpgArgs>),
}

/// Runs the command.
pub(super) fn run(command: &EvalCommand) -> anyhow::Result<()> {
    ranks::join()?;
    match &command.benchmark {
        Benchmark::Shapes(args) => shapes::run(args),
        Benchmark::Geneval(args) => geneval::run(args),
        Benchmark::Hps(args) => hps::run(args),
        Benchmark::ImageReward(args) => image_reward::run(args),
        Benchmark::Dpg(args) => dpg::run(args),
    }
}
