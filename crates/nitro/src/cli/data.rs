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
use nitro_data::mds::{Compression, Damage, Hash, Index, WriterOptions, merge_index};
use serde::{Deserialize, Serialize};

use super::failure::say;
use super::{interrupt, ranks};

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
    /// [default: as mpirun or srun says, else 0]
    #[arg(long, value_name = "N", requires = "ranks")]
    rank: Option<usize>,
    /// Processes that share the work; the last one to finish joins all parts
    /// [default: as mpirun or srun says, else 1]
    #[arg(long, value_name = "N", requires = "rank", value_parser = positive)]
    ranks: Option<usize>,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number of at least 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

impl OutputArgs {
    /// This process's share: as the arguments say, else of the processes that were started together,
    /// which it meets.
    fn share(&self) -> anyhow::Result<Share> {
        if let (Some(rank), Some(ranks)) = (self.rank, self.ranks) {
            return Ok(Share { rank, ranks });
        }
        ranks::join()?;
        let comm = ranks::comm();
        Ok(Share {
            rank: comm.rank(),
            ranks: comm.size(),
        })
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

/// What this process has done of a job.
#[derive(Serialize, Deserialize)]
struct Done {
    tally: Tally,
    shards: usize,
    /// Samples that this run of the job wrote.
    now: u64,
    seconds: f64,
    /// Whether the dataset's own index is there.
    complete: bool,
    /// Damaged shards that were met.
    damage: Vec<Damage>,
}

impl Done {
    /// What was written of `index` since `begun`, when `before` was done.
    fn of(index: &Index, tally: Tally, before: &Tally, begun: Instant, complete: bool) -> Self {
        Self {
            shards: index.shards.len(),
            now: tally.written.saturating_sub(before.written),
            seconds: begun.elapsed().as_secs_f64(),
            tally,
            complete,
            damage: Vec::new(),
        }
    }

    /// What all processes have done together.
    fn together(self) -> anyhow::Result<Self> {
        let comm = ranks::comm();
        if comm.size() == 1 {
            return Ok(self);
        }
        let mut all = comm.gather(&serde_json::to_vec(&self)?)?.into_iter();
        let first = all.next().unwrap_or_default();
        let mut sum: Self = serde_json::from_slice(&first)?;
        for other in all {
            let other: Self = serde_json::from_slice(&other)?;
            sum.tally.add(other.tally);
            sum.shards += other.shards;
            sum.now += other.now;
            sum.seconds = sum.seconds.max(other.seconds);
            // The last process to finish joins the parts.
            sum.complete |= other.complete;
            for damage in other.damage {
                if !sum.damage.iter().any(|known| known.shard == damage.shard) {
                    sum.damage.push(damage);
                }
            }
        }
        Ok(sum)
    }

    /// Tells what was done, `what` being written: once for all processes.
    fn report(self, what: &'static str, share: Share, json: bool) -> anyhow::Result<()> {
        let done = self.together()?;
        let rate = done.now as f64 / done.seconds.max(1e-9);
        if json {
            say(serde_json::json!({
                "samples": done.tally.written,
                "skipped": done.tally.skipped,
                "shards": done.shards,
                "written_now": done.now,
                "seconds": done.seconds,
                "per_second": rate,
                "complete": done.complete,
            }));
            return Ok(());
        }
        let Done {
            shards,
            now,
            seconds,
            ..
        } = done;
        say(format!(
            "{} samples in {shards} shard(s); now {now} {what} in {seconds:.1} s, {rate:.2} {what}/s",
            done.tally.written
        ));
        for (reason, skipped) in &done.tally.skipped {
            say(format!("left out: {} ({reason}), such as:", skipped.count));
            for example in &skipped.examples {
                say(format!("  {example}"));
            }
        }
        if !done.complete {
            say(format!(
                "rank {} of {} is done; the last rank to finish joins the parts",
                share.rank, share.ranks
            ));
        }
        for damage in done.damage {
            let shard = damage.shard.display();
            say(format!("damaged: {shard}: {}", damage.reason));
        }
        Ok(())
    }
}

/// Whether to go on; `Stopped` once Ctrl-C was pressed.
fn go_on() -> Result<(), DataError> {
    match interrupt::check().is_continue() {
        true => Ok(()),
        false => Err(DataError::Stopped),
    }
}
