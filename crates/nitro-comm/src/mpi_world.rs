//! Processes that talk over MPI.
//!
//! Calls are made by one thread at a time (`MPI_THREAD_SERIALIZED`), under a lock. An error of the
//! library ends the run with its own message, as MPI's default error handler has it; a process that
//! is killed is noticed by the launcher, which ends the others.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use mpi::{Count, Threading};

use crate::{Comm, CommError, Launch};

/// Values exchanged in one message; bounds the memory of a sum.
const BLOCK: usize = 1 << 22;
/// Bytes gathered in one message, of all processes together. MPI counts with 32 bits.
const MOST_BYTES: u64 = 1 << 30;

/// Waiting ranks look without a pause for so long, and then from time to time: a rank that paints
/// sample pictures or writes a checkpoint needs the cores that the others would spend on looking.
const EAGER: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(2);

/// The processes that a launcher started together (`MPI_COMM_WORLD`).
#[derive(Debug)]
pub struct MpiWorld {
    rank: usize,
    size: usize,
    /// `None` once left.
    universe: Mutex<Option<Joined>>,
}

/// MPI is initialised as long as this exists.
struct Joined(Universe);

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MPI")
    }
}

impl MpiWorld {
    /// Initialises MPI and meets the others. The thread that asks is MPI's main thread: it also
    /// [leaves](Comm::leave).
    ///
    /// # Errors
    /// MPI is initialised already, cannot serve several threads in turn, or sees other processes
    /// than `launch` says.
    pub fn join(launch: Launch) -> Result<Self, CommError> {
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| CommError::Mpi("it is initialised already".to_owned()))?;
        if threading < Threading::Serialized {
            let reason = format!("the library supports {threading:?}, expected Serialized");
            return Err(CommError::Mpi(reason));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        if size != launch.size {
            return Err(CommError::WrongMpi {
                by: launch.by,
                expected: launch.size,
                found: size,
            });
        }
        Ok(Self {
            rank,
            size,
            universe: Mutex::new(Some(Joined(universe))),
        })
    }

    fn enter(&self) -> Result<Turn<'_>, CommError> {
        let universe = self.universe.lock().unwrap_or_else(PoisonError::into_inner);
        match universe.is_some() {
            true => Ok(Turn(universe)),
            false => Err(CommError::Mpi("this process has left the run".to_owned())),
        }
    }
}

/// The right to call MPI.
struct Turn<'a>(MutexGuard<'a, Option<Joined>>);

impl Turn<'_> {
    /// The communicator, once all processes are here. Those who wait leave the cores to others.
    fn meet(&self) -> SimpleCommunicator {
        let world = SimpleCommunicator::world();
        let mut request = world.immediate_barrier();
        let (begun, mut nap) = (Instant::now(), Duration::from_micros(20));
        loop {
            match request.test() {
                Ok(_) => return world,
                Err(open) => request = open,
            }
            if begun.elapsed() < EAGER {
                std::thread::yield_now();
            } else {
                std::thread::sleep(nap);
                nap = (2 * nap).min(LONGEST_NAP);
            }
        }
    }
}

impl Comm for MpiWorld {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    /// Each process adds up one part of the values and sends it to the others: on the wire what a
    /// ring sends, in an order that depends on ranks alone.
    fn sum(&self, values: &mut [f32]) -> Result<(), CommError> {
        let turn = self.enter()?;
        let world = turn.meet();
        let mut counts = vec![0u64; self.size];
        world.all_gather_into(&(values.len() as u64), &mut counts[..]);
        if let Some(rank) = counts.iter().position(|count| *count != counts[0]) {
            return Err(CommError::Differ {
                what: "how many values they add up",
                first: counts[0].to_string(),
                rank,
                other: counts[rank].to_string(),
            });
        }
        let (mut sent, mut received, mut part) = (Vec::new(), Vec::new(), Vec::new());
        for block in values.chunks_mut(BLOCK) {
            let each = block.len().div_ceil(self.size);
            let padded = each * self.size;
            sent.clear();
            sent.extend_from_slice(block);
            sent.resize(padded, 0.0f32);
            received.resize(padded, 0.0f32);
            world.all_to_all_into(&sent[..], &mut received[..]);
            part.clear();
            part.resize(each, 0.0f32);
            for others in received.chunks_exact(each) {
                for (sum, value) in part.iter_mut().zip(others) {
                    *sum += value;
                }
            }
            world.all_gather_into(&part[..], &mut sent[..]);
            block.copy_from_slice(&sent[..block.len()]);
        }
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let turn = self.enter()?;
        let world = turn.meet();
        let mut lengths = vec![0u64; self.size];
        world.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
        // All see the same lengths, so all stop or none.
        let total: u64 = lengths.iter().sum();
        if total > MOST_BYTES {
            let reason = format!("{total} bytes gathered at once, expected {MOST_BYTES} at most");
            return Err(CommError::Mpi(reason));
        }
        let counts: Vec<Count> = lengths.iter().map(|length| *length as Count).collect();
        let begin = |rank: usize| counts[..rank].iter().sum();
        let begins: Vec<Count> = (0..self.size).map(begin).collect();
        let mut all = vec![0u8; total as usize];
        let mut parts = PartitionMut::new(&mut all[..], &counts[..], &begins[..]);
        world.all_gather_varcount_into(bytes, &mut parts);
        let mut rest = all.as_slice();
        let take = |length: &u64| {
            let (mine, others) = rest.split_at(*length as usize);
            rest = others;
            mine.to_vec()
        };
        Ok(lengths.iter().map(take).collect())
    }

    fn wait(&self) -> Result<(), CommError> {
        self.enter()?.meet();
        Ok(())
    }

    fn leave(&self) -> Result<(), CommError> {
        let mut turn = self.enter()?;
        turn.meet();
        drop(turn.0.take().map(|Joined(universe)| universe));
        Ok(())
    }

    fn abort(&self, code: i32) {
        if self.enter().is_ok() {
            SimpleCommunicator::world().abort(code);
        }
    }
}
