//! What several processes of one run say to each other.
//!
//! A run's batch is cut among its processes by rank; each computes the gradient of its part, and
//! [`Comm::sum`] adds the parts up. Everything else (weights, moments, averages, schedule) is the same
//! on every process, because it follows from the same sums in the same order.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use crate::TrainError;
use crate::optimizer::NamedGradients;

/// One of the processes of a run.
pub trait Comm: fmt::Debug + Send + Sync {
    /// This process's number, from 0. Rank 0 writes files and talks.
    fn rank(&self) -> usize;

    /// The number of processes.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over all processes, to the same bits on each. All call it with
    /// equally many values.
    ///
    /// # Errors
    /// Another process is gone.
    fn sum(&self, values: &mut [f32]) -> Result<(), TrainError>;
}

/// A run of one process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Comm for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f32]) -> Result<(), TrainError> {
        Ok(())
    }
}

/// One rank of several that are threads of one process: what tests use in MPI's place.
#[derive(Debug)]
pub struct Thread {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    parts: Vec<Mutex<Vec<f32>>>,
    barrier: Barrier,
}

impl Thread {
    /// The ranks of a group of `size`, one for each thread.
    pub fn group(size: usize) -> Vec<Self> {
        let group = Arc::new(Group {
            parts: (0..size).map(|_| Mutex::default()).collect(),
            barrier: Barrier::new(size),
        });
        (0..size)
            .map(|rank| Self {
                rank,
                group: group.clone(),
            })
            .collect()
    }
}

impl Comm for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.parts.len()
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), TrainError> {
        let part = |rank: usize| {
            self.group.parts[rank]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        *part(self.rank) = values.to_vec();
        self.group.barrier.wait();
        values.fill(0.0);
        for rank in 0..self.size() {
            for (sum, value) in values.iter_mut().zip(part(rank).iter()) {
                *sum += value;
            }
        }
        // Nobody writes the next part before all have read this one.
        self.group.barrier.wait();
        Ok(())
    }
}

/// The examples of a batch of `batch` that part `part` of `parts` of this process computes.
///
/// Rank and part together cut the batch in order, so that any number of processes and parts see the
/// same examples.
pub(crate) fn share(comm: &dyn Comm, batch: usize, part: usize, parts: usize) -> Range<usize> {
    let each = batch / (comm.size() * parts);
    let first = (comm.rank() * parts + part) * each;
    first..first + each
}

/// Elements summed in one message.
const BUCKET: usize = 1 << 22;

/// Replaces `gradients` and `scalars` by their means over all processes.
pub(crate) fn mean(
    comm: &dyn Comm,
    gradients: &mut NamedGradients,
    scalars: &mut [f64],
) -> Result<(), TrainError> {
    if comm.size() == 1 {
        return Ok(());
    }
    let scale = 1.0 / comm.size() as f32;
    let mut message: Vec<f32> = scalars.iter().map(|value| *value as f32).collect();
    comm.sum(&mut message)?;
    for (value, sum) in scalars.iter_mut().zip(message) {
        *value = f64::from(sum * scale);
    }
    // Small tensors travel together, in name order, which is the same on every process.
    let mut open: Vec<&mut Vec<f32>> = Vec::new();
    let mut elements = 0;
    for gradient in gradients.values_mut() {
        elements += gradient.len();
        open.push(gradient);
        if elements >= BUCKET {
            sum_bucket(comm, &mut open, scale)?;
            elements = 0;
        }
    }
    sum_bucket(comm, &mut open, scale)
}

fn sum_bucket(
    comm: &dyn Comm,
    open: &mut Vec<&mut Vec<f32>>,
    scale: f32,
) -> Result<(), TrainError> {
    let mut bucket: Vec<f32> = open
        .iter()
        .flat_map(|gradient| gradient.iter().copied())
        .collect();
    comm.sum(&mut bucket)?;
    let mut rest = bucket.as_slice();
    for gradient in open.drain(..) {
        let (mine, others) = rest.split_at(gradient.len());
        for (value, sum) in gradient.iter_mut().zip(mine) {
            *value = sum * scale;
        }
        rest = others;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cut_the_batch_in_order_however_many_there_are() {
        for (size, parts) in [(1, 1), (1, 4), (2, 3), (4, 1)] {
            let mut seen = Vec::new();
            for comm in Thread::group(size) {
                for part in 0..parts {
                    seen.extend(share(&comm, 24, part, parts));
                }
            }
            assert_eq!(seen, (0..24).collect::<Vec<_>>());
        }
    }

    #[test]
    fn gradients_and_scalars_become_their_means_on_every_rank() {
        let work = |comm: Thread| {
            let own = comm.rank() as f32;
            let mut gradients = NamedGradients::from([
                ("a".to_owned(), vec![own, 2.0 * own]),
                ("b".to_owned(), vec![1.0; 3]),
            ]);
            let mut scalars = [f64::from(own), 8.0];
            mean(&comm, &mut gradients, &mut scalars).unwrap();
            (gradients, scalars)
        };
        let threads: Vec<_> = Thread::group(2)
            .into_iter()
            .map(|comm| std::thread::spawn(move || work(comm)))
            .collect();
        for thread in threads {
            let (gradients, scalars) = thread.join().unwrap();
            assert_eq!(gradients["a"], [0.5, 1.0]);
            assert_eq!(gradients["b"], [1.0; 3]);
            assert_eq!(scalars, [0.5, 8.0]);
        }
    }
}
