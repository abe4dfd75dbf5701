//! Threads of one process in the place of processes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::{Comm, CommError};

/// One rank of several that are threads of one process. A rank that is dropped, because its thread
/// ended or panicked, is gone: those who wait for it are told.
#[derive(Debug)]
pub struct Thread {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    size: usize,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Meeting {
    /// What the ranks that are here gave.
    given: Vec<Option<Vec<u8>>>,
    /// What all gave at the last whole meeting, for those who have not taken it yet.
    result: Arc<Vec<Vec<u8>>>,
    /// Meetings so far.
    number: u64,
    gone: Option<usize>,
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Thread {
    /// The ranks of a group of `size`, one for each thread.
    pub fn group(size: usize) -> Vec<Self> {
        let group = Arc::new(Group {
            size,
            meeting: Mutex::new(Meeting {
                given: vec![None; size],
                ..Meeting::default()
            }),
            changed: Condvar::new(),
        });
        let rank = |rank| Self {
            rank,
            group: group.clone(),
        };
        (0..size).map(rank).collect()
    }

    /// What `work` gives on each of `size` threads, by rank.
    ///
    /// # Panics
    /// If one of them does.
    pub fn run<T: Send>(size: usize, work: impl Fn(Self) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = Self::group(size)
                .into_iter()
                .map(|comm| scope.spawn(|| work(comm)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, T>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// Gives `bytes` and takes what all gave.
    fn meet(&self, bytes: Vec<u8>) -> Result<Arc<Vec<Vec<u8>>>, CommError> {
        let group = &self.group;
        let mut meeting = group.lock();
        meeting.given[self.rank] = Some(bytes);
        let mine = meeting.number;
        if meeting.given.iter().all(Option::is_some) {
            let given = meeting.given.iter_mut().filter_map(Option::take).collect();
            meeting.result = Arc::new(given);
            meeting.number += 1;
            group.changed.notify_all();
        }
        // The next meeting cannot become whole without this rank, so the result stays.
        while meeting.number == mine {
            if let Some(rank) = meeting.gone {
                return Err(CommError::Gone { rank });
            }
            meeting = group
                .changed
                .wait(meeting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(meeting.result.clone())
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.group.lock().gone.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }
}

impl Comm for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), CommError> {
        let bytes = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        let all = self.meet(bytes)?;
        values.fill(0.0);
        for (rank, part) in all.iter().enumerate() {
            let (words, _) = part.as_chunks::<4>();
            if words.len() != values.len() {
                return Err(CommError::Differ {
                    what: "how many values they add up",
                    first: values.len().to_string(),
                    rank,
                    other: words.len().to_string(),
                });
            }
            for (sum, word) in values.iter_mut().zip(words) {
                *sum += f32::from_ne_bytes(*word);
            }
        }
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.meet(bytes.to_vec()).map(|all| all.to_vec())
    }

    fn abort(&self, _: i32) {
        self.group.lock().gone.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_gatherings_reach_every_rank() {
        let seen = Thread::run(3, |comm| {
            let own = comm.rank() as f32;
            let mut values = [own, 1.0];
            comm.sum(&mut values).unwrap();
            let said = comm.gather("x".repeat(comm.rank()).as_bytes()).unwrap();
            comm.wait().unwrap();
            (values, said)
        });
        for (values, said) in seen {
            assert_eq!(values, [3.0, 3.0]);
            assert_eq!(said, [&b""[..], b"x", b"xx"]);
        }
    }

    #[test]
    fn a_rank_that_ends_ends_the_others() {
        let seen = Thread::run(3, |comm| match comm.rank() {
            1 => Ok(()),
            _ => comm.sum(&mut [0.0]),
        });
        let gone = Err(CommError::Gone { rank: 1 });
        assert_eq!(seen, [gone.clone(), Ok(()), gone]);
    }
}
