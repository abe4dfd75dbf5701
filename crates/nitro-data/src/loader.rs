//! Batches for training: in the order of [`mds::order`](crate::mds::order), decoded ahead by threads,
//! resumable at any batch.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::mds::order::{Order, Place, World};
use crate::mds::{Dataset, Sample};
use crate::{DataError, Result};

/// How a [`Loader`] walks through a dataset.
#[derive(Debug, Clone)]
pub struct LoaderOptions {
    /// Order and batch size of this rank.
    pub order: Order,
    /// Everyone who trains.
    pub world: World,
    /// This process among them, counted over all nodes.
    pub rank: usize,
    /// Leave out incomplete batches at the end of an epoch, as the official training does.
    pub drop_last: bool,
    /// Threads that read and decode; they decide nothing about the order.
    pub threads: usize,
    /// Batches kept ready.
    pub prefetch: usize,
}

impl LoaderOptions {
    /// One process, Nitro-E's shuffle.
    pub fn new(batch_size: usize) -> Self {
        Self {
            order: Order::shuffled(batch_size),
            world: World::SINGLE,
            rank: 0,
            drop_last: true,
            threads: 2,
            prefetch: 4,
        }
    }
}

/// Where a [`Loader`] is; the fields of `StreamingDataset.state_dict()`, and meaning the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Samples of the epoch seen by all ranks together.
    pub sample_in_epoch: usize,
    /// Canonical nodes of the run.
    pub num_canonical_nodes: usize,
    /// Seed of the run.
    pub shuffle_seed: u64,
    /// Nodes with which the run began.
    pub initial_physical_nodes: usize,
}

/// A batch.
#[derive(Debug)]
pub struct Batch<T> {
    /// The samples, decoded. Fewer than the batch size only where damaged ones were skipped, or at
    /// an epoch's end without `drop_last`.
    pub items: Vec<T>,
    /// Their numbers in the dataset.
    pub indices: Vec<usize>,
    /// The epoch they belong to.
    pub epoch: u64,
}

/// Endless batches of one rank; epoch follows epoch. Dropping it ends its threads.
#[derive(Debug)]
pub struct Loader<T> {
    dataset: Arc<Dataset>,
    options: LoaderOptions,
    state: LoaderState,
    /// Batches of this epoch that were handed out since `epoch_start`.
    handed: usize,
    /// `sample_in_epoch` at which the present epoch's work begins.
    epoch_start: usize,
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
    waited: Duration,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<Queue<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Queue<T> {
    /// Batches of the present epoch.
    plan: Arc<Vec<Vec<usize>>>,
    /// Raised with every new plan, so that late results of an old one are dropped.
    generation: u64,
    next: usize,
    handed: usize,
    ready: BTreeMap<usize, Result<Decoded<T>>>,
    stopped: bool,
}

/// Items with their numbers.
type Decoded<T> = Vec<(usize, T)>;

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue<T>>) -> MutexGuard<'a, Queue<T>> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + 'static> Loader<T> {
    /// Walks through `dataset` from the beginning, or from where `resume` says. `decode` runs on the
    /// loader's threads and gets every sample with its number in the dataset.
    ///
    /// # Errors
    /// Numbers from which no order follows, or an epoch without a whole batch.
    pub fn new(
        dataset: Arc<Dataset>,
        options: LoaderOptions,
        resume: Option<LoaderState>,
        decode: impl Fn(usize, &Sample) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let world = options.world;
        if options.rank >= world.ranks() {
            let what = format!("rank {} of {}", options.rank, world.ranks());
            return Err(DataError::Order(what));
        }
        let state = resume.unwrap_or(LoaderState {
            epoch: 0,
            sample_in_epoch: 0,
            num_canonical_nodes: options.order.canonical_nodes_in(world),
            shuffle_seed: options.order.seed,
            initial_physical_nodes: world.nodes,
        });
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                plan: Arc::new(Vec::new()),
                generation: 0,
                next: 0,
                handed: 0,
                ready: BTreeMap::new(),
                stopped: false,
            }),
            changed: Condvar::new(),
        });
        let mut loader = Self {
            dataset,
            options,
            state,
            handed: 0,
            epoch_start: state.sample_in_epoch,
            shared,
            threads: Vec::new(),
            waited: Duration::ZERO,
        };
        loader.plan()?;
        let decode = Arc::new(decode);
        for _ in 0..loader.options.threads.max(1) {
            let (shared, dataset) = (loader.shared.clone(), loader.dataset.clone());
            let (decode, prefetch) = (decode.clone(), loader.options.prefetch.max(1));
            let work = move || decode_batches(&shared, &dataset, &*decode, prefetch);
            loader.threads.push(std::thread::spawn(work));
        }
        Ok(loader)
    }

    /// Plans the rest of the present epoch.
    fn plan(&mut self) -> Result<()> {
        let place = Place {
            epoch: self.state.epoch,
            sample_in_epoch: self.state.sample_in_epoch,
            canonical_nodes: Some(self.state.num_canonical_nodes),
            seed: Some(self.state.shuffle_seed),
            initial_nodes: Some(self.state.initial_physical_nodes),
        };
        let sizes = self.dataset.shard_sizes();
        let work = self.options.order.work(&sizes, self.options.world, place)?;
        let ranks = self.options.world.ranks_per_node;
        let (node, rank) = (self.options.rank / ranks, self.options.rank % ranks);
        let batches = work.batches(node, rank, self.options.drop_last);
        if batches.is_empty() && self.state.sample_in_epoch == 0 {
            return Err(DataError::Order(format!(
                "{} samples make no batch of {} for each of {} ranks; choose a smaller batch",
                self.dataset.len(),
                self.options.order.batch_size,
                self.options.world.ranks()
            )));
        }
        self.epoch_start = self.state.sample_in_epoch;
        self.handed = 0;
        let mut queue = self.shared.lock();
        queue.plan = Arc::new(batches);
        queue.generation += 1;
        queue.next = 0;
        queue.handed = 0;
        queue.ready.clear();
        drop(queue);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The next batch. A batch of which every sample was skipped as damaged is passed over.
    pub fn next_batch(&mut self) -> Result<Batch<T>> {
        let mut empty = 0;
        loop {
            let mut queue = self.shared.lock();
            let planned = queue.plan.len();
            if self.handed == planned {
                drop(queue);
                if empty > 0 && empty >= planned && self.epoch_start == 0 {
                    let what = "every sample of an epoch was skipped as damaged";
                    return Err(DataError::Order(what.to_owned()));
                }
                self.state.epoch += 1;
                self.state.sample_in_epoch = 0;
                self.plan()?;
                continue;
            }
            let begun = Instant::now();
            let batch = loop {
                match queue.ready.remove(&self.handed) {
                    Some(batch) => break batch,
                    None => queue = self.shared.wait(queue),
                }
            };
            self.waited += begun.elapsed();
            self.handed += 1;
            queue.handed = self.handed;
            drop(queue);
            self.shared.changed.notify_all();
            let global = self.options.order.batch_size * self.options.world.ranks();
            self.state.sample_in_epoch = self.epoch_start + self.handed * global;
            let decoded = batch?;
            if decoded.is_empty() {
                empty += 1;
                continue;
            }
            let (indices, items) = decoded.into_iter().unzip();
            return Ok(Batch {
                items,
                indices,
                epoch: self.state.epoch,
            });
        }
    }

    /// Where the loader is, behind the batches handed out. A loader made with this state hands out
    /// what this one would hand out next.
    pub fn state(&self) -> LoaderState {
        self.state
    }

    /// Time that [`Loader::next_batch`] spent waiting for data.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The dataset, with the damage met so far.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

/// What a loader's thread does: batches in order, never more than `prefetch` ahead.
fn decode_batches<T>(
    shared: &Shared<T>,
    dataset: &Dataset,
    decode: &(dyn Fn(usize, &Sample) -> Result<T> + Send + Sync),
    prefetch: usize,
) {
    let mut queue = shared.lock();
    while !queue.stopped {
        if queue.next >= queue.plan.len() || queue.next >= queue.handed + prefetch {
            queue = shared.wait(queue);
            continue;
        }
        let (number, generation, plan) = (queue.next, queue.generation, queue.plan.clone());
        queue.next += 1;
        drop(queue);
        let item = |index: &usize| -> Result<Option<(usize, T)>> {
            let decoded = dataset.decoded(*index, |sample| decode(*index, sample))?;
            Ok(decoded.map(|item| (*index, item)))
        };
        let work = || {
            plan[number]
                .iter()
                .filter_map(|index| item(index).transpose())
                .collect()
        };
        // A panic of `decode` must reach the trainer, who would wait for ever for the batch.
        let batch = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let batch = batch.unwrap_or_else(|_| {
            Err(DataError::Order(format!(
                "decoding batch {number} panicked; see above"
            )))
        });
        queue = shared.lock();
        if queue.generation == generation {
            queue.ready.insert(number, batch);
        }
        shared.changed.notify_all();
    }
}
