//! Who started this process, and as one of how many.

use std::sync::Arc;

use crate::{Comm, CommError, Single};

/// What a launcher told this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// This process's number.
    pub rank: usize,
    /// Processes started together.
    pub size: usize,
    /// The environment variable that says so.
    pub by: &'static str,
}

/// Set to 0, it makes each process of `mpirun` or `srun` a run of its own.
const SWITCH: &str = "NITRO_MPI";

/// Variables with rank and number of processes: Open MPI's and PRRTE's mpirun; MPICH's, Intel's and
/// `srun --mpi=pmi2`; srun. The last come with a job step only, not with the script around it.
const VARIABLES: [(&str, &str); 3] = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];

/// What the launcher of this process says, if there was one.
pub fn launched() -> Option<Launch> {
    read(|name| std::env::var(name).ok())
}

fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
    if variable(SWITCH).is_some_and(|value| value == "0") {
        return None;
    }
    let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
    VARIABLES.iter().find_map(|(rank, size)| {
        Some(Launch {
            rank: number(rank)?,
            size: number(size)?,
            by: size,
        })
    })
}

/// The processes of this run: itself, or those that were started together with it. Asked once, by the
/// main thread.
///
/// # Errors
/// There are several, but MPI is not built in or does not see them.
pub fn connect() -> Result<Arc<dyn Comm>, CommError> {
    match launched() {
        Some(launch) if launch.size > 1 => several(launch),
        _ => Ok(Arc::new(Single)),
    }
}

#[cfg(feature = "mpi")]
fn several(launch: Launch) -> Result<Arc<dyn Comm>, CommError> {
    Ok(Arc::new(crate::MpiWorld::join(launch)?))
}

#[cfg(not(feature = "mpi"))]
fn several(Launch { size, by, .. }: Launch) -> Result<Arc<dyn Comm>, CommError> {
    Err(CommError::NoMpi { by, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pairs: &[(&str, &str)]) -> Option<(usize, usize)> {
        let value = |name: &str| {
            let pair = pairs.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        read(value).map(|launch| (launch.rank, launch.size))
    }

    #[test]
    fn launchers_are_recognised_by_their_variables() {
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")];
        assert_eq!(told(&open_mpi), Some((1, 4)));
        assert_eq!(told(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), Some((0, 2)));
        let srun = [("SLURM_PROCID", "5"), ("SLURM_STEP_NUM_TASKS", "8")];
        assert_eq!(told(&srun), Some((5, 8)));
        // A batch script knows of the job's tasks, but is one process.
        assert_eq!(told(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), None);
        assert_eq!(told(&[]), None);
        let off = [&open_mpi[..], &[("NITRO_MPI", "0")]].concat();
        assert_eq!(told(&off), None);
    }
}
