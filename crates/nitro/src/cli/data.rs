//! `nitro data`: raw image-text sets to MDS shards, synthetic pictures, features, a look inside.

mod ingest;
mod inspect;
mod precompute;
mod synthesize;

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use nitro_data::DataError;
use nitro_data::job::{Share, Tally};
use nitro_data::mds::{Compression, Hash, WriterOptions, merge_index};

use super::failure::say;
use super::interrupt;

/// What to do with data.
#[derive(Subcommand)]
pub(super) enum DataCommand {
    /// Raw image-text sets to MDS shards with captions
    #[command(subcommand)]
    Ingest(ingest::IngestCommand),
    /// What is in a dataset: counts, columns, sizes, damage, a contact sheet
    Inspect(inspect::InspectArgs),
    /// A picture for every prompt of a list, made by a model
    Synthesize(Box<synthesize::SynthesizeArgs>),
    /// Add a model's features to a dataset: latents, text states and masks, DINOv2 features
    Precompute(Box<precompute::PrecomputeArgs>),
    /// Join the datasets in sub-folders by an index over all of them
    Merge(MergeArgs),
}

/// Arguments of `nitro data merge`.
#[derive(Args)]
pub(super) struct MergeArgs {
    /// Folder that gets the joint index.json
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Sub-folders of DIR, in order
    #[arg(value_name = "PART", required = true)]
    parts: Vec<PathBuf>,
}

/// Where shards go, and which part of the work this process does.
#[derive(Args)]
struct OutputArgs {
    /// Folder for the dataset; the same command run again goes on where it stopped
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Size of a shard
    #[arg(long, default_value_t = 64, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..4096))]
    shard_size: u64,
    /// Compress shards: zstd or zstd:LEVEL
    #[arg(long, value_name = "NAME")]
    compression: Option<Compression>,
    /// Hashes to store for each shard: md5, sha1, sha256, xxh64, xxh3_64, ...
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = Hash::from_name)]
    hashes: Vec<Hash>,
    /// This process's number among those that share the work; it writes into DIR/RANK
    #[arg(long, default_value_t = 0, value_name = "N")]
    rank: usize,
    /// Processes that share the work; the last one to finish joins all parts
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = positive)]
    ranks: usize,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number of at least 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

impl OutputArgs {
    fn share(&self) -> Share {
        Share {
            rank: self.rank,
            ranks: self.ranks,
        }
    }

    fn writer(&self) -> WriterOptions {
        WriterOptions {
            compression: self.compression,
            hashes: self.hashes.clone(),
            size_limit: self.shard_size << 20,
        }
    }
}

/// Runs the command.
pub(super) fn run(command: &DataCommand) -> anyhow::Result<()> {
    interrupt::install();
    interrupt::watched(|| match command {
        DataCommand::Ingest(command) => ingest::run(command),
        DataCommand::Inspect(args) => inspect::run(args),
        DataCommand::Synthesize(args) => synthesize::run(args),
        DataCommand::Precompute(args) => precompute::run(args),
        DataCommand::Merge(args) => {
            let index = merge_index(&args.dir, &args.parts)?;
            say(format!(
                "{} samples in {} shards",
                index.samples(),
                index.shards.len()
            ));
            Ok(())
        }
    })
}

/// What a job has done, for its end.
struct Done<'a> {
    what: &'static str,
    tally: &'a Tally,
    shards: usize,
    /// What earlier runs of the job had done.
    before: &'a Tally,
    begun: Instant,
    share: Share,
    /// Whether the dataset's own index is there.
    complete: bool,
}

impl Done<'_> {
    fn report(&self, json: bool) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let now = self.tally.written.saturating_sub(self.before.written);
        let rate = now as f64 / seconds.max(1e-9);
        if json {
            say(serde_json::json!({
                "samples": self.tally.written,
                "skipped": self.tally.skipped,
                "shards": self.shards,
                "written_now": now,
                "seconds": seconds,
                "per_second": rate,
                "complete": self.complete,
            }));
            return;
        }
        let Done { what, shards, .. } = self;
        say(format!(
            "{} samples in {shards} shard(s); now {now} {what} in {seconds:.1} s, {rate:.2} {what}/s",
            self.tally.written
        ));
        for (reason, skipped) in &self.tally.skipped {
            say(format!("left out: {} ({reason}), such as:", skipped.count));
            for example in &skipped.examples {
                say(format!("  {example}"));
            }
        }
        if !self.complete {
            say(format!(
                "rank {} of {} is done; the last rank to finish joins the parts",
                self.share.rank, self.share.ranks
            ));
        }
    }
}

/// Whether to go on; `Stopped` once Ctrl-C was pressed.
fn go_on() -> Result<(), DataError> {
    match interrupt::check().is_continue() {
        true => Ok(()),
        false => Err(DataError::Stopped),
    }
}
