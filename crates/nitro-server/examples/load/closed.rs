//! A closed loop: so many clients, each of which asks for the next picture when it has the last.

use std::time::{Duration, Instant};

use crate::asking::{End, Target, agent};

/// The share of the time before anything counts: batches and caches fill.
const WARM_UP: f64 = 0.25;

/// After a refusal; a polite client would wait as long as it is told.
const PAUSE: Duration = Duration::from_millis(50);

/// What clients saw after the warm-up.
#[derive(Default)]
pub(crate) struct Seen {
    /// Pictures per second.
    pub(crate) rate: f64,
    /// Of requests that ended in pictures, ascending.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) refused: usize,
    pub(crate) errors: Vec<String>,
    pictures: usize,
}

pub(crate) fn run(target: &Target, clients: usize, time: Duration) -> Seen {
    let began = Instant::now();
    let from = began + time.mul_f64(WARM_UP);
    let until = began + time;
    let each: Vec<Seen> = std::thread::scope(|scope| {
        let ask = |client| move || one_client(target, client, from, until);
        let threads: Vec<_> = (0..clients).map(|c| scope.spawn(ask(c))).collect();
        let lost = |_| Seen {
            errors: vec!["a client crashed".to_owned()],
            ..Seen::default()
        };
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(lost))
            .collect()
    });
    let mut all = Seen::default();
    for seen in each {
        all.latencies.extend(seen.latencies);
        all.refused += seen.refused;
        all.errors.extend(seen.errors);
        all.pictures += seen.pictures;
    }
    all.latencies.sort_unstable();
    all.rate = all.pictures as f64 / (until - from).as_secs_f64();
    all
}

fn one_client(target: &Target, client: usize, from: Instant, until: Instant) -> Seen {
    let agent = agent();
    let mut seen = Seen::default();
    for i in 0.. {
        let began = Instant::now();
        let end = target.ask(&agent, client * 10_000 + i, until);
        let now = Instant::now();
        match end {
            End::Pictures(count) if now >= from => {
                seen.pictures += count;
                seen.latencies.push(now - began);
            }
            End::Pictures(_) => {}
            End::Refused(_) => {
                seen.refused += usize::from(now >= from);
                std::thread::sleep(PAUSE);
            }
            End::Unfinished => break,
            End::Error(error) => seen.errors.push(error),
        }
    }
    seen
}
