//! Which sample comes when: the order of mosaicml-streaming's `StreamingDataset` with the shuffle
//! `py1s`, or without shuffle.
//!
//! Dataset folders are *streams*, of which an epoch may take more or less ([`Streams`]). Shards are spread over *canonical nodes*, whose number belongs to the training and not to the
//! machine, so that the order survives a change of machines. The shuffle mixes shards within a
//! canonical node and samples within a shard ([`shuffle_py1s`]); the partition deals the canonical
//! nodes' samples out to nodes, ranks and loader workers ([`partition`]).

mod partition;
mod shuffle;
mod streams;

use serde::{Deserialize, Serialize};

pub use partition::{Work, partition};
pub use shuffle::shuffle_py1s;
pub use streams::{Sampling, Streams, Weight};

use crate::{DataError, Result};

/// The reference's default seed.
pub const DEFAULT_SEED: u64 = 9176;

/// Who shares the samples of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct World {
    /// Machines.
    pub nodes: usize,
    /// Processes on each.
    pub ranks_per_node: usize,
    /// Loader workers of each process, as torch's `DataLoader` counts them; 0 counts as 1. Only the
    /// order depends on it.
    pub workers_per_rank: usize,
}

impl World {
    /// One process with one worker.
    pub const SINGLE: World = World {
        nodes: 1,
        ranks_per_node: 1,
        workers_per_rank: 1,
    };

    /// Processes on all machines.
    pub fn ranks(&self) -> usize {
        self.nodes * self.ranks_per_node
    }
}

/// What decides the order, besides the shards and the world.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// Shuffle with `py1s`.
    pub shuffle: bool,
    /// Seed of the shuffle; the epoch is added to it.
    pub seed: u64,
    /// Canonical nodes. `None`: 64 for every node with shuffle, else one for every node.
    pub canonical_nodes: Option<usize>,
    /// Samples in a batch of one rank.
    pub batch_size: usize,
    /// How often an epoch takes the samples of each stream.
    pub streams: Streams,
}

impl Order {
    /// Nitro-E's: shuffled, the reference's seed.
    pub fn shuffled(batch_size: usize) -> Self {
        Self {
            shuffle: true,
            seed: DEFAULT_SEED,
            canonical_nodes: None,
            batch_size,
            streams: Streams::default(),
        }
    }

    /// Index order.
    pub fn sequential(batch_size: usize) -> Self {
        Self {
            shuffle: false,
            ..Self::shuffled(batch_size)
        }
    }

    /// Canonical nodes in this world.
    pub fn canonical_nodes_in(&self, world: World) -> usize {
        let default = if self.shuffle {
            64 * world.nodes
        } else {
            world.nodes
        };
        self.canonical_nodes.unwrap_or(default)
    }

    /// Samples of each stream in an epoch. `shard_sizes` are the samples of each shard, stream by
    /// stream.
    ///
    /// # Errors
    /// Weights that do not go together.
    pub fn choose(&self, shard_sizes: &[impl AsRef<[usize]>]) -> Result<Vec<usize>> {
        let count = |sizes: &dyn AsRef<[usize]>| sizes.as_ref().iter().sum();
        let samples: Vec<usize> = shard_sizes.iter().map(|sizes| count(sizes)).collect();
        self.streams.choose(&samples, self.seed)
    }

    /// The samples of an epoch for everyone, from `place` on. `shard_sizes` are the samples of each
    /// shard, stream by stream; streams without weights are one behind the other as one is.
    ///
    /// # Errors
    /// Numbers of zero, or of nodes and canonical nodes that do not divide each other; weights that do
    /// not go together.
    pub fn work(
        &self,
        shard_sizes: &[impl AsRef<[usize]>],
        world: World,
        place: Place,
    ) -> Result<Work> {
        let canonical = place
            .canonical_nodes
            .unwrap_or_else(|| self.canonical_nodes_in(world));
        let chosen = self.choose(shard_sizes)?;
        let samples = chosen.iter().sum();
        let mut work = partition(
            samples,
            canonical,
            world,
            self.batch_size,
            place.sample_in_epoch,
            place.initial_nodes,
        )?;
        let seed = place.seed.unwrap_or(self.seed);
        let sizes: Vec<&[usize]> = shard_sizes.iter().map(AsRef::as_ref).collect();
        let epoch = self
            .streams
            .resample(&sizes, &chosen, seed, place.epoch, self.shuffle)?;
        if self.shuffle {
            work.replace(&shuffle_py1s(&epoch.units, canonical, seed, place.epoch)?);
        }
        if let Some(samples) = &epoch.samples {
            work.replace(samples);
        }
        Ok(work)
    }
}

/// Where in which epoch, and what an earlier run has settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Samples of the epoch that all ranks together have seen.
    pub sample_in_epoch: usize,
    /// Canonical nodes of the run that is resumed.
    pub canonical_nodes: Option<usize>,
    /// Seed of the run that is resumed.
    pub seed: Option<u64>,
    /// Nodes of the run that is resumed, when it began.
    pub initial_nodes: Option<usize>,
}

impl Place {
    /// The beginning of an epoch.
    pub fn epoch(epoch: u64) -> Self {
        Self {
            epoch,
            ..Self::default()
        }
    }
}

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(DataError::Order(reason.into()))
}
