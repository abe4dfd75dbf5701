//! `nitro reproduce`: what the paper says, measured again in the miniature.

mod ablations;
mod table2;

use clap::Subcommand;

use super::ranks;

/// What to measure again.
#[derive(Subcommand)]
pub(super) enum ReproduceCommand {
    /// Short trainings without one of the paper's parts at a time: token compression, position
    /// reinforcement, ASA, AdaLN-affine, REPA (hours on two cores; started again, it goes on where
    /// it was)
    Ablations(ablations::AblationsArgs),
    /// Base, GRPO and four-step model: speed, size, the six tasks (hours on two cores; started again,
    /// it goes on where it was)
    Table2(table2::Table2Args),
}

/// Runs the command.
pub(super) fn run(command: &ReproduceCommand) -> anyhow::Result<()> {
    ranks::alone("nitro reproduce")?;
    match command {
        ReproduceCommand::Ablations(args) => ablations::run(args),
        ReproduceCommand::Table2(args) => table2::run(args),
    }
}
