//! Batches by number: which samples the n-th batch of a run holds.
//!
//! A trainer whose steps are functions of their number needs no reader that remembers where it is: a
//! run resumed at step n asks for batch n. Its batches are global ones; processes cut them among
//! themselves, so that any number of processes sees the same samples at the same step.

use std::sync::{Arc, Mutex, PoisonError};

use crate::mds::order::{Order, Place, World};
use crate::{DataError, Result};

/// The whole batches of all epochs, in the order that one process of `StreamingDataset` with one
/// worker has. The batches of several ranks are, taken together, the same ones (their order within a
/// batch differs), but for the end of an epoch: the reference repeats samples there until all ranks
/// have equally many.
#[derive(Debug)]
pub struct Batches {
    order: Order,
    /// Stream by stream.
    shard_sizes: Vec<Vec<usize>>,
    per_epoch: u64,
    /// The epoch asked for last.
    plan: Mutex<Option<(u64, Arc<Plan>)>>,
}

type Plan = Vec<Vec<usize>>;

impl Batches {
    /// The batches of `order` over streams with shards of these sizes. An incomplete batch at an epoch's end is
    /// left out, as the official training does.
    ///
    /// # Errors
    /// Numbers from which no order follows, or an epoch without a whole batch.
    pub fn new(shard_sizes: Vec<Vec<usize>>, order: Order) -> Result<Self> {
        let mut this = Self {
            order,
            shard_sizes,
            per_epoch: 0,
            plan: Mutex::new(None),
        };
        // Every epoch has equally many.
        this.per_epoch = this.epoch(0)?.len() as u64;
        if this.per_epoch == 0 {
            return Err(DataError::Order(format!(
                "{} samples make no batch of {}; choose a smaller batch",
                this.order.choose(&this.shard_sizes)?.iter().sum::<usize>(),
                this.order.batch_size
            )));
        }
        Ok(this)
    }

    /// Batches of an epoch. The reference repeats samples until each of its canonical nodes, 64 if
    /// nothing else is said, has equally many, so a very small dataset has longer epochs than samples.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// The samples of batch `number`, counted over all epochs.
    pub fn get(&self, number: u64) -> Result<Vec<usize>> {
        let (epoch, within) = (number / self.per_epoch, number % self.per_epoch);
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = match &*plan {
            Some((of, planned)) if *of == epoch => planned.clone(),
            _ => {
                let planned = Arc::new(self.epoch(epoch)?);
                *plan = Some((epoch, planned.clone()));
                planned
            }
        };
        Ok(planned[within as usize].clone())
    }

    fn epoch(&self, epoch: u64) -> Result<Plan> {
        let place = Place::epoch(epoch);
        let work = self.order.work(&self.shard_sizes, World::SINGLE, place)?;
        Ok(work.batches(0, 0, true))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn any_batch_of_any_epoch_can_be_asked_for() {
        let sizes = vec![vec![40, 40, 48]];
        let batches = Batches::new(sizes.clone(), Order::shuffled(10)).unwrap();
        assert_eq!(batches.per_epoch(), 128 / 10);
        let all: Vec<_> = (0..36).map(|n| batches.get(n).unwrap()).collect();
        for (epoch, some) in all.chunks(12).enumerate() {
            let work = Order::shuffled(10)
                .work(&sizes, World::SINGLE, Place::epoch(epoch as u64))
                .unwrap();
            assert_eq!(some, &work.batches(0, 0, true)[..12]);
        }
        assert_ne!(all[0], all[12], "each epoch has its own order");
        for number in [35, 0, 20, 12] {
            assert_eq!(batches.get(number).unwrap(), all[number as usize]);
        }
        // Seven samples are repeated until each of 64 canonical nodes has one.
        let few = |batch| Batches::new(vec![vec![3], vec![4]], Order::shuffled(batch));
        assert_eq!(few(8).unwrap().per_epoch(), 8);
        assert!(few(65).is_err());
    }

    /// What makes a run independent of the number of its processes, and the official order of a run
    /// on one machine the same as ours.
    #[test]
    fn the_batches_of_several_ranks_are_the_same_ones_together() {
        let sizes = vec![vec![100, 100], vec![60]];
        for (ranks, workers) in [(2, 1), (4, 1), (4, 3)] {
            let world = World {
                nodes: 1,
                ranks_per_node: ranks,
                workers_per_rank: workers,
            };
            let whole = Batches::new(sizes.clone(), Order::shuffled(4 * ranks)).unwrap();
            let work = Order::shuffled(4)
                .work(&sizes, world, Place::epoch(1))
                .unwrap();
            let parts: Vec<_> = (0..ranks).map(|rank| work.batches(0, rank, true)).collect();
            for number in 0..whole.per_epoch() as usize - 1 {
                let together: BTreeSet<usize> =
                    parts.iter().flat_map(|rank| rank[number].clone()).collect();
                let one = whole.get(whole.per_epoch() + number as u64).unwrap();
                assert_eq!(together, one.into_iter().collect(), "batch {number}");
            }
        }
    }
}
