//! The processes of one run: how many there are, and what they say to each other.
//!
//! Work is cut among processes by rank; [`Comm::sum`] adds up what each computed, [`Comm::gather`]
//! brings together what each found. [`connect`] says which processes there are: one, or those that
//! `mpirun` or `srun` started, where the cargo feature `mpi` is built in. [`Thread`] is a group of
//! threads that behaves like them.

mod error;
mod launch;
#[cfg(feature = "mpi")]
mod mpi_world;
mod thread;

use std::fmt;
use std::ops::Range;

pub use error::CommError;
pub use launch::{Launch, connect, launched};
#[cfg(feature = "mpi")]
pub use mpi_world::MpiWorld;
pub use thread::Thread;

/// One of the processes of a run.
///
/// Except for [`rank`](Comm::rank), [`size`](Comm::size) and [`abort`](Comm::abort), all processes call
/// the same functions in the same order.
pub trait Comm: fmt::Debug + Send + Sync {
    /// This process's number, from 0. Rank 0 writes files and talks.
    fn rank(&self) -> usize;

    /// The number of processes.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over all processes, added in the order of ranks: the same bits
    /// on each process, and the same whenever it is asked again. All call it with equally many values.
    ///
    /// # Errors
    /// Another process is gone, or gave another number of values.
    fn sum(&self, values: &mut [f32]) -> Result<(), CommError>;

    /// What each process gives, by rank. It may be of any length.
    ///
    /// # Errors
    /// Another process is gone.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// Waits until all processes are here.
    ///
    /// # Errors
    /// Another process is gone.
    fn wait(&self) -> Result<(), CommError> {
        self.gather(&[]).map(drop)
    }

    /// Leaves the run in good order, once all processes are here. Nothing else may be asked after it.
    ///
    /// # Errors
    /// Another process is gone.
    fn leave(&self) -> Result<(), CommError> {
        self.wait()
    }

    /// Ends all other processes, whatever they do; a launcher exits with `code`. May not return.
    fn abort(&self, code: i32);
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

    fn sum(&self, _: &mut [f32]) -> Result<(), CommError> {
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(vec![bytes.to_vec()])
    }

    fn abort(&self, _: i32) {}
}

/// The part of `count` things that is this process's. The parts of all ranks follow one another and
/// differ by one thing at most.
pub fn part(comm: &dyn Comm, count: usize) -> Range<usize> {
    let (rank, size) = (comm.rank(), comm.size());
    count * rank / size..count * (rank + 1) / size
}

/// Fails unless all processes say the same `text` about `what`.
///
/// # Errors
/// Two processes differ; each is told who, and both texts. Another process is gone.
pub fn agree(comm: &dyn Comm, what: &'static str, text: &str) -> Result<(), CommError> {
    if comm.size() == 1 {
        return Ok(());
    }
    let said = comm.gather(text.as_bytes())?;
    let other = said.iter().position(|other| *other != said[0]);
    other.map_or(Ok(()), |rank| {
        let text = |rank: usize| String::from_utf8_lossy(&said[rank]).into_owned();
        Err(CommError::Differ {
            what,
            first: text(0),
            rank,
            other: text(rank),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for count in [0, 1, 5, 12] {
            let ranks = Thread::group(5);
            let all: Vec<usize> = ranks.iter().flat_map(|comm| part(comm, count)).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn ranks_that_differ_are_told_apart() {
        let told = Thread::run(3, |comm| {
            let same = agree(&comm, "the step", "7");
            let text = if comm.rank() == 2 { "8" } else { "7" };
            (same.is_ok(), agree(&comm, "the step", text))
        });
        for (same, other) in told {
            assert!(same);
            let told = other.unwrap_err().to_string();
            assert!(told.contains("rank 2") && told.contains('8'), "{told}");
        }
    }
}
