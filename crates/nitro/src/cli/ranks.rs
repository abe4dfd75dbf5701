//! The processes of one command: alone, or with those that `mpirun` or `srun` started beside it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nitro_train::comm::{Comm, Single, connect};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::bad_input;
use super::interrupt;

static COMM: OnceLock<Arc<dyn Comm>> = OnceLock::new();

/// Meets the processes that were started together with this one, for a command that shares its work.
/// Called by the main thread, before anything else.
pub(super) fn join() -> anyhow::Result<()> {
    let comm = connect().map_err(|error| bad_input(error.to_string()))?;
    // Asked twice, the processes are the same ones.
    let _ = COMM.set(comm);
    Ok(())
}

/// The processes of this command.
pub(super) fn comm() -> Arc<dyn Comm> {
    COMM.get().cloned().unwrap_or_else(|| Arc::new(Single))
}

/// Whether this process talks.
pub(super) fn is_first() -> bool {
    COMM.get().is_none_or(|comm| comm.rank() == 0)
}

/// Fails where several processes were started of a command that is one.
pub(super) fn alone(command: &str) -> anyhow::Result<()> {
    join()?;
    match comm().size() {
        1 => Ok(()),
        size => Err(bad_input(format!(
            "`{command}` runs as one process, and {size} were started"
        ))),
    }
}

/// The end of a command that went well: all processes leave together.
pub(super) fn leave() -> anyhow::Result<()> {
    match COMM.get() {
        Some(comm) => Ok(comm.leave()?),
        None => Ok(()),
    }
}

/// How a command that failed begins to say so. What is wrong for all of them, the first process says
/// alone: the others leave it the time to end them all.
pub(super) fn failing() -> String {
    match COMM.get() {
        Some(comm) if comm.rank() > 0 => {
            std::thread::sleep(Duration::from_secs(2));
            format!("rank {} of {}: ", comm.rank(), comm.size())
        }
        _ => String::new(),
    }
}

/// Ends the other processes, which may be waiting for this one.
pub(super) fn abort(code: u8) {
    if let Some(comm) = COMM.get() {
        comm.abort(i32::from(code));
    }
}

/// Shares `todo` out in rounds of `each` things for every process. `work` does this process's part of
/// a round; the first process's `keep` gets what all of them made of it, in order, and how many things are
/// done. Ctrl-C ends it between two rounds.
///
/// All processes must have the same things to do.
pub(super) fn rounds<T, R: Serialize + DeserializeOwned>(
    todo: &[T],
    each: usize,
    mut work: impl FnMut(&[T]) -> anyhow::Result<Vec<R>>,
    mut keep: impl FnMut(Vec<R>, usize) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let comm = comm();
    let (mut done, total) = (0, todo.len());
    interrupt::watched(|| {
        for round in todo.chunks(each * comm.size()) {
            if interrupt::check().is_break() {
                return Err(nitro::PipelineError::Cancelled { done, total }.into());
            }
            let mine = work(&round[nitro_comm::part(&*comm, round.len())])?;
            done += round.len();
            let all = match comm.size() {
                1 => mine,
                _ => {
                    let mut all = Vec::with_capacity(round.len());
                    for part in comm.gather(&serde_json::to_vec(&mine)?)? {
                        all.extend(serde_json::from_slice::<Vec<R>>(&part)?);
                    }
                    all
                }
            };
            if is_first() {
                keep(all, done)?;
            }
        }
        Ok(())
    })
}
