//! Sharing work between threads, and scratch memory that is kept between calls.
//!
//! Kernels run on the rayon pool of the caller (`rayon::ThreadPool::install` chooses another one).
//! A call from outside the pool costs a hand-over of some microseconds; long loops of small kernels
//! are best run inside [`install`].

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::packed::memory::{Buffer, EXACT};

/// The number of threads kernels called from here will use.
pub fn num_threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` on a thread of the pool, so that the kernels it calls need no hand-over.
pub fn install<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return f();
    }
    // `join` from outside moves both closures onto the pool and waits.
    rayon::join(f, || ()).0
}

/// Calls `f(0)`, ..., `f(tasks - 1)`, each once, on as many threads as the pool has. Tasks are taken
/// in order as threads get free, so unequal tasks balance.
pub fn par_for(tasks: usize, f: impl Fn(usize) + Sync) {
    let workers = num_threads().min(tasks);
    if workers <= 1 {
        (0..tasks).for_each(f);
        return;
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            f(i);
        }
    };
    fan_out(workers, &work);
}

/// Several [`par_for`] one after the other for the price of one: calls `f(phase, 0)`, ...,
/// `f(phase, counts[phase] - 1)` for every phase, no phase before the one before it is complete.
///
/// Tasks are taken in order, so a thread that waits for a phase waits only for tasks that other
/// threads are already running: there is nothing to deadlock on, however few threads join in. Tasks
/// must not share out work themselves: a thread could then wait for a task further down its own stack.
pub fn par_phases(counts: &[usize], f: impl Fn(usize, usize) + Sync) {
    let widest = counts.iter().copied().max().unwrap_or(0);
    let workers = num_threads().min(widest);
    if workers <= 1 {
        for (phase, &count) in counts.iter().enumerate() {
            (0..count).for_each(|task| f(phase, task));
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let done: Vec<AtomicUsize> = counts.iter().map(|_| AtomicUsize::new(0)).collect();
    let failed = AtomicBool::new(false);
    let work = || {
        let (mut phase, mut start) = (0, 0);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            while phase < counts.len() && i >= start + counts[phase] {
                start += counts[phase];
                phase += 1;
                if !wait_for(&done[phase - 1], counts[phase - 1], &failed) {
                    return;
                }
            }
            if phase == counts.len() {
                return;
            }
            let guard = OnUnwind(&failed);
            f(phase, i - start);
            std::mem::forget(guard);
            done[phase].fetch_add(1, Ordering::Release);
        }
    };
    fan_out(workers, &work);
}

/// Waits until `done` has reached `count`; false if a task panicked meanwhile.
fn wait_for(done: &AtomicUsize, count: usize, failed: &AtomicBool) -> bool {
    let mut spins = 0_u32;
    while done.load(Ordering::Acquire) < count {
        if failed.load(Ordering::Relaxed) {
            return false;
        }
        spins += 1;
        if spins < 20_000 {
            std::hint::spin_loop();
        } else {
            // More threads than cores: let the one that works have this core.
            std::thread::yield_now();
        }
    }
    true
}

/// Tells the other threads that a task panicked, so that they do not wait for it.
struct OnUnwind<'a>(&'a AtomicBool);

impl Drop for OnUnwind<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` `copies` times, in parallel where threads are free. A copy that starts late finds the
/// counter exhausted and returns at once.
fn fan_out(copies: usize, work: &(impl Fn() + Sync)) {
    if copies <= 1 {
        work();
        return;
    }
    let left = copies / 2;
    rayon::join(|| fan_out(copies - left, work), || fan_out(left, work));
}

/// One cache line; the unit of scratch memory, so that packed panels start aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; 16]);

thread_local! {
    // A stack, because a thread that waits for its own parallel call may run another one meanwhile.
    static SCRATCH: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// A scratch buffer of this thread, given back when dropped. Contents are arbitrary.
pub(crate) struct Scratch {
    buffer: Buffer,
}

impl Scratch {
    /// A buffer of at least `bytes` bytes, aligned to 64.
    pub(crate) fn take(bytes: usize) -> Scratch {
        if EXACT {
            let mut buffer = Buffer::new(bytes);
            // Arbitrary contents: who reads what nobody wrote gets NaN.
            buffer.spoil();
            return Scratch { buffer };
        }
        let mut buffer = SCRATCH.with(|stack| {
            let mut stack = stack.borrow_mut();
            // The smallest that fits, so that a large panel buffer is not spent on a small block.
            let best = (0..stack.len())
                .filter(|&i| stack[i].len() >= bytes)
                .min_by_key(|&i| stack[i].len());
            match best {
                Some(i) => stack.swap_remove(i),
                None => stack.pop().unwrap_or_default(),
            }
        });
        if buffer.len() < bytes {
            // A fresh one rather than a larger copy: old contents are not needed.
            drop(buffer);
            buffer = Buffer::new(bytes);
        }
        Scratch { buffer }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.buffer.as_mut_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if EXACT {
            return;
        }
        // The thread may be shutting down; then the memory is simply freed.
        let _ = SCRATCH.try_with(|stack| stack.borrow_mut().push(buffer));
    }
}

/// A pointer that may cross threads. Whoever dereferences it says why the accesses do not overlap.
#[derive(Clone, Copy)]
pub(crate) struct SharedPtr<T>(pub(crate) *mut T);

// SAFETY: the pointer itself is plain data; every use states which part it owns.
unsafe impl<T: Send> Send for SharedPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for tasks in [0, 1, 2, 3, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            par_for(tasks, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts
                    .iter()
                    .all(|count| count.load(Ordering::Relaxed) == 1)
            );
        }
    }

    #[test]
    fn a_phase_begins_when_the_one_before_is_complete() {
        let counts = [7, 0, 300, 1, 64];
        let done: Vec<AtomicUsize> = counts.iter().map(|_| AtomicUsize::new(0)).collect();
        par_phases(&counts, |phase, task| {
            assert!(task < counts[phase]);
            for (earlier, count) in done.iter().zip(counts).take(phase) {
                assert_eq!(earlier.load(Ordering::SeqCst), count);
            }
            done[phase].fetch_add(1, Ordering::SeqCst);
        });
        let done: Vec<usize> = done.iter().map(|d| d.load(Ordering::SeqCst)).collect();
        assert_eq!(done, counts);
    }

    #[test]
    fn a_panic_in_a_phase_reaches_the_caller() {
        let result = std::panic::catch_unwind(|| {
            par_phases(&[8, 8], |phase, task| {
                assert!(phase == 1 || task != 3, "task 3 fails");
            });
        });
        assert!(result.is_err());
    }

    #[test]
    fn nested_calls_do_not_share_scratch() {
        par_for(4, |_| {
            let mut outer = Scratch::take(1000);
            let first = outer.as_mut_ptr() as usize;
            par_for(4, |_| {
                let mut inner = Scratch::take(1000);
                assert_ne!(inner.as_mut_ptr() as usize, first);
            });
        });
    }
}
