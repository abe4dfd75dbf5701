//! How a run's work is shared among its processes ([`nitro_comm`]).
//!
//! A run's batch is cut among its processes by rank; each computes the gradient of its part, and
//! [`Comm::sum`] adds the parts up. Everything else (weights, moments, averages, schedule) is the same
//! on every process, because it follows from the same sums in the same order.

use std::ops::Range;

use crate::TrainError;
use crate::optimizer::NamedGradients;
use crate::store::ParameterStore;

use nitro_comm::agree;
pub use nitro_comm::{Comm, CommError, Single, Thread, connect};

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

/// Fails unless all processes have the same weights at the same step.
///
/// Weights follow from the same sums, but each process computes its own: machines with other
/// instruction sets round differently, and a run that was started from different files is two runs.
pub(crate) fn agree_on_weights(
    comm: &dyn Comm,
    step: u64,
    store: &ParameterStore,
) -> Result<(), TrainError> {
    if comm.size() == 1 {
        return Ok(());
    }
    let sum = store.iter().fold(0, |sum, (_, entry)| {
        crc32c::crc32c_append(sum, bytemuck::cast_slice(&entry.value))
    });
    let text = format!("weights {sum:08x} at step {step}");
    Ok(agree(comm, "what they train", &text)?)
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
        for (gradients, scalars) in Thread::run(2, work) {
            assert_eq!(gradients["a"], [0.5, 1.0]);
            assert_eq!(gradients["b"], [1.0; 3]);
            assert_eq!(scalars, [0.5, 8.0]);
        }
    }
}
