//! Where time goes, by operation: fused operations report to a recorder while one is on.
//!
//! Recording is off by default; an operation then costs one relaxed load of a flag more. What is not
//! a fused operation (Burn's additions, concatenations, copies) is not seen here: it is the rest of
//! the whole.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static TOTALS: Mutex<BTreeMap<String, Total>> = Mutex::new(BTreeMap::new());

#[derive(Clone, Copy, Default)]
struct Total {
    calls: u64,
    time: Duration,
    operations: f64,
}

/// What all calls of one operation with the same shapes took.
#[derive(Clone, Debug, PartialEq)]
pub struct OpTime {
    /// The operation and the shapes of its first inputs, such as `Linear [1, 256, 768] [2304, 768]`;
    /// backward passes end in `backward`.
    pub name: String,
    /// How often it ran.
    pub calls: u64,
    /// How long all calls took together.
    pub time: Duration,
    /// Floating-point operations of all calls; 0 where the operation does not count them.
    pub operations: f64,
}

/// Records everything that runs until [`stop`], from nothing.
pub fn start() {
    totals(BTreeMap::clear);
    ON.store(true, Ordering::Relaxed);
}

/// Ends the recording and gives what was recorded, the longest time first.
pub fn stop() -> Vec<OpTime> {
    ON.store(false, Ordering::Relaxed);
    let recorded = totals(std::mem::take);
    let mut times: Vec<OpTime> = recorded
        .into_iter()
        .map(|(name, total)| OpTime {
            name,
            calls: total.calls,
            time: total.time,
            operations: total.operations,
        })
        .collect();
    times.sort_by_key(|time| std::cmp::Reverse(time.time));
    times
}

/// Times what runs until it is dropped.
pub(crate) struct Scope {
    name: String,
    operations: f64,
    begun: Instant,
}

/// The scope of an operation that `describe` names, with its floating-point operations; `None`, at no
/// cost, while nothing is recorded. Scopes must not contain each other, or time counts twice.
#[inline]
pub(crate) fn scope(describe: impl FnOnce() -> (String, f64)) -> Option<Scope> {
    ON.load(Ordering::Relaxed).then(|| {
        let (name, operations) = describe();
        Scope {
            name,
            operations,
            begun: Instant::now(),
        }
    })
}

impl Drop for Scope {
    fn drop(&mut self) {
        let time = self.begun.elapsed();
        totals(|totals| {
            let total = totals.entry(std::mem::take(&mut self.name)).or_default();
            total.calls += 1;
            total.time += time;
            total.operations += self.operations;
        });
    }
}

fn totals<T>(act: impl FnOnce(&mut BTreeMap<String, Total>) -> T) -> T {
    act(&mut TOTALS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner()))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::{Activation, Precision, linear};

    #[test]
    fn operations_are_recorded_only_between_start_and_stop() {
        let device = Device::flex();
        let x = Tensor::<2>::ones([3, 4], &device);
        let weight = Tensor::<2>::ones([5, 4], &device);
        let run = || linear(x.clone(), &weight, None, Activation::None, Precision::F32);
        run();
        start();
        run();
        run();
        let times = stop();
        run();
        // Other tests of this process may have run operations of other shapes meanwhile.
        let time = times
            .iter()
            .find(|time| time.name.contains("[3, 4]") && time.name.contains("[5, 4]"));
        let time = time.expect("the operation was recorded");
        assert_eq!(
            (time.calls, time.operations),
            (2, 2.0 * 2.0 * 3.0 * 4.0 * 5.0)
        );
    }
}
