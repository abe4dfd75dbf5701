//! Running something several times.

use std::time::{Duration, Instant};

use super::{BenchError, Options};

/// However long a run takes, there are so many: a median of fewer says nothing.
const LEAST_RUNS: usize = 3;

/// What several runs took.
#[derive(Clone, Debug)]
pub(super) struct Timing {
    sorted: Vec<Duration>,
}

impl Timing {
    pub(super) fn median(&self) -> Duration {
        let middle = self.sorted.len() / 2;
        match self.sorted.len() % 2 {
            0 => (self.sorted[middle - 1] + self.sorted[middle]) / 2,
            _ => self.sorted[middle],
        }
    }

    pub(super) fn shortest(&self) -> Duration {
        self.sorted[0]
    }

    pub(super) fn longest(&self) -> Duration {
        self.sorted[self.sorted.len() - 1]
    }

    pub(super) fn runs(&self) -> usize {
        self.sorted.len()
    }
}

/// Runs `work` to warm up, then as often as `options` say; `before(done, total)` hears of each run
/// and may end the work.
pub(super) fn measure(
    options: &Options,
    work: &mut dyn FnMut() -> Result<(), BenchError>,
    before: &mut dyn FnMut(usize, usize) -> Result<(), BenchError>,
) -> Result<Timing, BenchError> {
    let runs = options.runs.max(1);
    let total = options.warmup + runs;
    for done in 0..options.warmup {
        before(done, total)?;
        work()?;
    }
    let begun = Instant::now();
    let mut sorted = Vec::with_capacity(runs);
    while sorted.len() < runs && (sorted.len() < LEAST_RUNS || begun.elapsed() < options.budget) {
        before(options.warmup + sorted.len(), total)?;
        let start = Instant::now();
        work()?;
        sorted.push(start.elapsed());
    }
    sorted.sort();
    Ok(Timing { sorted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let timing = |ms: &[u64]| Timing {
            sorted: ms.iter().map(|ms| Duration::from_millis(*ms)).collect(),
        };
        assert_eq!(timing(&[7]).median(), Duration::from_millis(7));
        assert_eq!(timing(&[1, 2, 90]).median(), Duration::from_millis(2));
        assert_eq!(timing(&[1, 2, 4, 90]).median(), Duration::from_millis(3));
    }

    #[test]
    fn a_spent_budget_leaves_three_runs_and_warming_up_is_not_counted() {
        let options = Options {
            runs: 9,
            warmup: 2,
            budget: Duration::ZERO,
            ..Options::default()
        };
        let mut calls = 0;
        let mut work = || {
            calls += 1;
            Ok(())
        };
        let timing = measure(&options, &mut work, &mut |_, _| Ok(())).unwrap();
        assert_eq!((timing.runs(), calls), (3, 5));
    }

    #[test]
    fn work_can_be_ended_between_runs() {
        let stop = measure(&Options::default(), &mut || Ok(()), &mut |done, _| {
            if done == 2 {
                Err(BenchError::Cancelled)
            } else {
                Ok(())
            }
        });
        assert!(matches!(stop, Err(BenchError::Cancelled)));
    }
}
