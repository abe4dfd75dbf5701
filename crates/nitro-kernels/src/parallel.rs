//! Dividing element-wise and row-wise work into tasks whose boundaries depend on the shape alone, so
//! that sums over rows come out the same for any number of threads.

use crate::pool::{SharedPtr, par_for};

/// Elements of one task: large enough to hide the hand-over between threads.
const TASK_ELEMENTS: usize = 16 * 1024;

/// Calls `f` with consecutive ranges that cover `0..len`, in parallel.
pub(crate) fn for_ranges(len: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
    par_for(len.div_ceil(TASK_ELEMENTS), |task| {
        let start = task * TASK_ELEMENTS;
        f(start..len.min(start + TASK_ELEMENTS));
    });
}

/// A mutable view of part of a shared buffer.
///
/// # Safety
/// The range must lie in the buffer, which must outlive the view, and no other view of it may be
/// alive.
pub(crate) unsafe fn part<'a>(
    buffer: SharedPtr<f32>,
    range: std::ops::Range<usize>,
) -> &'a mut [f32] {
    // SAFETY: the caller vouches for the range.
    unsafe { std::slice::from_raw_parts_mut(buffer.get().add(range.start), range.len()) }
}

/// How the rows of `[batch, tokens, channels]` are divided. No task crosses a sample.
#[derive(Clone, Copy)]
pub(crate) struct RowTasks {
    batch: usize,
    tokens: usize,
    rows: usize,
    per_sample: usize,
}

/// The rows of one task.
pub(crate) struct RowTask {
    /// Which sample they belong to.
    pub(crate) sample: usize,
    /// The rows, counted over all samples.
    pub(crate) rows: std::ops::Range<usize>,
}

impl RowTask {
    /// The elements of the rows.
    pub(crate) fn elements(&self, channels: usize) -> std::ops::Range<usize> {
        self.rows.start * channels..self.rows.end * channels
    }
}

impl RowTasks {
    pub(crate) fn new(batch: usize, tokens: usize, channels: usize) -> Self {
        let rows = (TASK_ELEMENTS / channels.max(1)).clamp(1, tokens.max(1));
        Self {
            batch,
            tokens,
            rows,
            per_sample: tokens.div_ceil(rows),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.batch * self.per_sample
    }

    /// The sample of a task.
    pub(crate) fn sample(&self, task: usize) -> usize {
        task / self.per_sample
    }

    pub(crate) fn get(&self, task: usize) -> RowTask {
        let sample = self.sample(task);
        let first = task % self.per_sample * self.rows;
        let rows = self.rows.min(self.tokens - first);
        let start = sample * self.tokens + first;
        RowTask {
            sample,
            rows: start..start + rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn ranges_and_row_tasks_cover_everything_once() {
        for len in [0, 1, TASK_ELEMENTS, 3 * TASK_ELEMENTS + 5] {
            let seen = Mutex::new(Vec::new());
            for_ranges(len, |range| seen.lock().unwrap().extend(range));
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..len));
        }
        for (batch, tokens, channels) in [(2, 5, 7000), (3, 9000, 5), (1, 1, 1), (2, 0, 4)] {
            let tasks = RowTasks::new(batch, tokens, channels);
            let rows: Vec<usize> = (0..tasks.count())
                .flat_map(|task| {
                    let task = tasks.get(task);
                    assert!(task.rows.clone().all(|row| row / tokens == task.sample));
                    task.rows
                })
                .collect();
            assert!(rows.into_iter().eq(0..batch * tokens));
        }
    }
}
