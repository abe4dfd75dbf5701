//! Where a block's time goes, while someone asks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static NANOSECONDS: [AtomicU64; COUNT] = [const { AtomicU64::new(0) }; COUNT];
const COUNT: usize = 9;

/// Names of the phases, in the order in which they run.
pub const PHASE_NAMES: [&str; COUNT] = [
    "norm 1",
    "qkv",
    "attention",
    "quantise",
    "out",
    "norm 2",
    "up",
    "quantise",
    "down",
];

/// Adds up the time of every phase, over all threads, from nothing until [`stop`].
pub fn start() {
    NANOSECONDS
        .iter()
        .for_each(|n| n.store(0, Ordering::Relaxed));
    ON.store(true, Ordering::Relaxed);
}

/// The time that threads spent in each phase since [`start`] (waiting for each other not included).
pub fn stop() -> [Duration; COUNT] {
    ON.store(false, Ordering::Relaxed);
    std::array::from_fn(|i| Duration::from_nanos(NANOSECONDS[i].load(Ordering::Relaxed)))
}

/// Runs a task of a phase.
#[inline]
pub(super) fn timed(phase: usize, task: impl FnOnce()) {
    if !ON.load(Ordering::Relaxed) {
        task();
        return;
    }
    let begun = Instant::now();
    task();
    let nanoseconds = begun.elapsed().as_nanos() as u64;
    NANOSECONDS[phase].fetch_add(nanoseconds, Ordering::Relaxed);
}
