//! The command line: one module per command.

mod bench;
mod cache;
mod data;
mod eval;
mod failure;
mod generate;
mod info;
mod interrupt;
mod model_args;
mod outputs;
mod post_train;
mod progress;
mod ranks;
mod reproduce;
mod serve;
mod train;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Generate, evaluate and inspect images and models of Nitro-E.
#[derive(Parser)]
#[command(
    name = "nitro",
    version,
    about,
    max_term_width = 100,
    after_help = "Exit codes: 0 done; 1 failed (model, disk, network); 2 the request cannot be \
                  carried out as given; 130 stopped with Ctrl-C.\n\
                  Environment: NITRO_MODEL, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, \
                  HF_HUB_OFFLINE, NITRO_PROMPT_CACHE, NITRO_PACKED_CACHE."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make pictures from text
    Generate(Box<generate::GenerateArgs>),
    /// Serve pictures over HTTP: OpenAI's and AUTOMATIC1111's APIs, and a page
    Serve(Box<serve::ServeArgs>),
    /// Score a model on a benchmark
    Eval(eval::EvalCommand),
    /// Train models
    #[command(subcommand)]
    Train(train::TrainCommand),
    /// Measure again in the miniature what the paper says
    #[command(subcommand)]
    Reproduce(reproduce::ReproduceCommand),
    /// Make training data: raw image-text sets to MDS shards, synthetic pictures, features
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Look into models
    Model(ModelCommand),
    /// Measure this machine, and the full-size models on it
    Bench(bench::BenchArgs),
    /// Show or clear what is kept on disk to be faster next time: packed weights, text features
    Cache(cache::CacheArgs),
}

#[derive(Args)]
struct ModelCommand {
    #[command(subcommand)]
    command: Model,
}

#[derive(Subcommand)]
enum Model {
    /// Show what a model is made of: parameters, tokens per block group, cost of a forward pass
    Info(info::InfoArgs),
}

/// Runs the command that the arguments name.
pub(crate) fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Serve(args) => serve::run(*args),
        Command::Eval(command) => eval::run(&command),
        Command::Train(command) => train::run(&command),
        Command::Reproduce(command) => reproduce::run(&command),
        Command::Data(command) => data::run(&command),
        Command::Model(ModelCommand {
            command: Model::Info(args),
        }) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Cache(args) => cache::run(&args),
    };
    match result.and_then(|()| ranks::leave()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
