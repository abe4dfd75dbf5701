//! An open loop: requests come at a fixed rate that is far too much, and every one must end honestly.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::asking::{End, Target, agent, percentile, show};
use crate::closed;

/// Requests under way at most: more than a server's queue and batch, so that refusals do not wait for
/// pictures.
const WORKERS: usize = 192;

/// Whoever was accepted gets this long after the last request was sent.
const PATIENCE: Duration = Duration::from_secs(120);

/// Memory may grow by this share and these MiB before it counts as growing.
const FLAT: (f64, f64) = (1.2, 32.0);

pub(crate) struct Overload {
    pub(crate) time: Duration,
    /// How many times the server's capacity.
    pub(crate) times: f64,
    /// Pictures per second; measured if absent.
    pub(crate) capacity: Option<f64>,
    pub(crate) every: Duration,
}

#[derive(Default)]
struct Ends {
    sent: usize,
    pictures: Vec<Duration>,
    refused: BTreeMap<u16, usize>,
    refusals: Vec<Duration>,
    errors: Vec<String>,
}

/// Whether every request ended honestly, memory stayed flat, and the server answers afterwards.
pub(crate) fn run(target: &Target, overload: &Overload) -> bool {
    let capacity = overload.capacity.unwrap_or_else(|| {
        let time = (overload.time / 10).clamp(Duration::from_secs(3), Duration::from_secs(10));
        closed::run(target, 16, time).rate
    });
    let rate = capacity * overload.times;
    if rate <= 0.0 {
        eprintln!("error: the server makes no pictures; give --capacity");
        return false;
    }
    println!(
        "{:.0} s of {rate:.0} requests/s, {} times the {capacity:.1} pictures/s that the server makes:\n",
        overload.time.as_secs_f64(),
        overload.times
    );
    let began = Instant::now();
    let until = began + overload.time;
    let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let ends: Mutex<Ends> = Mutex::default();
    let mut memory = vec![target.memory()];
    std::thread::scope(|scope| {
        let work = || work(target, rate, began, until, &next, &ends);
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        let watch = scope.spawn(|| watch(target, overload, began, &over, &ends));
        for worker in workers {
            if worker.join().is_err() {
                lock(&ends).errors.push("a worker crashed".to_owned());
            }
        }
        over.store(true, Ordering::SeqCst);
        memory.extend(watch.join().unwrap_or_default());
    });
    memory.push(target.memory());
    let mut ends = ends.into_inner().unwrap_or_else(PoisonError::into_inner);
    ends.pictures.sort_unstable();
    ends.refusals.sort_unstable();

    let refused = |status| ends.refused.get(&status).copied().unwrap_or(0);
    println!("| requests | pictures | refused, 429 | refused, 503 | errors |");
    println!("| --- | --- | --- | --- | --- |");
    println!(
        "| {} | {} | {} | {} | {} |\n",
        ends.sent,
        ends.pictures.len(),
        refused(429),
        refused(503),
        ends.errors.len()
    );
    let time = overload.time.as_secs_f64();
    println!(
        "- {:.0} requests/s were sent; {:.2} pictures/s were made",
        ends.sent as f64 / time,
        ends.pictures.len() as f64 / time
    );
    println!(
        "- a picture took {:.2} s (p50), {:.2} s (p95); a refusal {:.0} ms (p50), {:.0} ms (p95)",
        percentile(&ends.pictures, 0.5),
        percentile(&ends.pictures, 0.95),
        percentile(&ends.refusals, 0.5) * 1e3,
        percentile(&ends.refusals, 0.95) * 1e3
    );
    let at = |share: f64| memory[((memory.len() - 1) as f64 * share).round() as usize];
    let most = memory.iter().copied().fold(f64::NAN, f64::max);
    println!(
        "- resident memory: {:.0} MiB at the start, {:.0} in the middle, {:.0} at the end, never more \
         than {most:.0}",
        at(0.0),
        at(0.5),
        at(1.0)
    );
    let after = Instant::now();
    let answers = matches!(
        target.ask(&agent(), ends.sent, after + PATIENCE),
        End::Pictures(_)
    );
    match answers {
        true => println!(
            "- afterwards: a picture in {:.2} s, {} wait",
            after.elapsed().as_secs_f64(),
            target.metric("nitro_pictures_waiting")
        ),
        false => println!("- afterwards: no picture"),
    }
    show(&ends.errors);
    // What the first pictures need is there by the second look.
    let flat = at(1.0) <= at(0.1) * FLAT.0 + FLAT.1;
    if !flat {
        eprintln!("error: memory grew");
    }
    ends.errors.is_empty() && flat && answers
}

/// Sends the requests whose time has come and nobody else has sent.
fn work(
    target: &Target,
    rate: f64,
    began: Instant,
    until: Instant,
    next: &AtomicUsize,
    ends: &Mutex<Ends>,
) {
    let agent = agent();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let due = began + Duration::from_secs_f64(number as f64 / rate);
        if due >= until {
            return;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if Instant::now() >= until {
            return;
        }
        let sent = Instant::now();
        let end = target.ask(&agent, number, until + PATIENCE);
        let time = sent.elapsed();
        let mut ends = lock(ends);
        ends.sent += 1;
        match end {
            End::Pictures(_) => ends.pictures.push(time),
            End::Refused(status) => {
                *ends.refused.entry(status).or_default() += 1;
                ends.refusals.push(time);
            }
            End::Unfinished => ends.errors.push("no answer at all".to_owned()),
            End::Error(error) => ends.errors.push(error),
        }
    }
}

/// Looks at the server's memory now and then, and says how it goes.
fn watch(
    target: &Target,
    overload: &Overload,
    began: Instant,
    over: &AtomicBool,
    ends: &Mutex<Ends>,
) -> Vec<f64> {
    let mut memory = Vec::new();
    let pause = (overload.time / 60).clamp(Duration::from_millis(200), Duration::from_secs(5));
    let mut told = Duration::ZERO;
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(pause);
        memory.push(target.memory());
        let elapsed = began.elapsed();
        if elapsed >= told + overload.every {
            told = elapsed;
            let ends = lock(ends);
            eprintln!(
                "{:.0} s: {} sent, {} pictures, {} refused, {} errors, {:.0} MiB",
                elapsed.as_secs_f64(),
                ends.sent,
                ends.pictures.len(),
                ends.refusals.len(),
                ends.errors.len(),
                memory.last().copied().unwrap_or(f64::NAN)
            );
        }
    }
    memory
}

fn lock(ends: &Mutex<Ends>) -> std::sync::MutexGuard<'_, Ends> {
    ends.lock().unwrap_or_else(PoisonError::into_inner)
}
