/// The processes of a run cannot go on together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// Several processes were started of a program that can only be one.
    #[error(
        "{by} started {size} processes of one run, but this nitro was built without MPI: build it \
         with `--features mpi`, start it alone, or set NITRO_MPI=0 if each process is to be a run of \
         its own"
    )]
    NoMpi {
        /// The environment variable that says so.
        by: &'static str,
        /// The processes.
        size: usize,
    },
    /// The MPI library does not know of the processes that the launcher started.
    #[error(
        "{by} says {expected} processes, but MPI sees {found}: nitro was built with another MPI \
         library than the one that starts it; use the mpirun of the same Open MPI, or \
         `srun --mpi=pmix`"
    )]
    WrongMpi {
        /// The environment variable that says so.
        by: &'static str,
        /// What it says.
        expected: usize,
        /// What the library says.
        found: usize,
    },
    /// The MPI library does not work.
    #[error("MPI: {0}")]
    Mpi(String),
    /// A process ended before the others.
    #[error("rank {rank} of the run has ended; its own message says why")]
    Gone {
        /// The process.
        rank: usize,
    },
    /// Processes that should do the same do not.
    #[error(
        "the processes of the run differ in {what}: rank 0 has {first}, rank {rank} has {other}; \
         give all of them the same arguments and the same files"
    )]
    Differ {
        /// In what.
        what: &'static str,
        /// Rank 0's.
        first: String,
        /// A process that differs.
        rank: usize,
        /// What it has.
        other: String,
    },
}
