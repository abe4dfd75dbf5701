//! GFLOP/s of the products and convolutions the models run, per instruction set and thread count.
//!
//! `cargo run --release -p nitro-kernels --example gemm_bench [filter]`: a filter keeps the lines that
//! contain it. The peak is measured first, by a product that stays in cache.

use std::time::{Duration, Instant};

use nitro_kernels::gemm::{Epilogue, MatRef, gemm_with_isa};
use nitro_kernels::isa::{Isa, Precision};

/// A product of the models: sizes, and whether A and B are transposed views.
struct Shape {
    name: &'static str,
    m: usize,
    n: usize,
    k: usize,
    a_transposed: bool,
    b_transposed: bool,
}

const fn shape(
    name: &'static str,
    (m, n, k): (usize, usize, usize),
    a_transposed: bool,
    b_transposed: bool,
) -> Shape {
    Shape {
        name,
        m,
        n,
        k,
        a_transposed,
        b_transposed,
    }
}

const SHAPES: [Shape; 16] = [
    shape("forward", (2304, 576, 192), false, true),
    shape("forward", (9216, 576, 192), false, true),
    shape("forward", (9216, 192, 192), false, true),
    shape("forward", (9216, 192, 576), false, true),
    shape("forward", (336, 768, 768), false, true),
    shape("forward", (336, 2304, 768), false, true),
    shape("forward", (128, 2048, 2048), false, true),
    shape("dgrad", (2304, 192, 576), false, false),
    shape("dgrad", (9216, 192, 576), false, false),
    shape("wgrad", (576, 192, 2304), true, false),
    shape("wgrad", (576, 192, 9216), true, false),
    shape("wgrad", (192, 192, 9216), true, false),
    shape("thin", (16384, 8, 192), false, true),
    shape("thin", (16384, 192, 8), false, true),
    shape("thin", (16384, 8, 8), false, true),
    shape("timestep", (24, 1152, 192), false, true),
];

/// Seconds this thread has spent on a core, where the system tells (Linux).
fn thread_seconds() -> Option<f64> {
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? * 1e-9)
}

/// The best of several runs, in seconds, spending about `budget`. With one thread and `NITRO_BENCH=cpu`
/// it is the mean time on the core instead, which other programs disturb less.
fn best(budget: Duration, mut run: impl FnMut()) -> f64 {
    run();
    let (start, cpu) = (Instant::now(), thread_seconds());
    let (mut best, mut count) = (f64::INFINITY, 0);
    while start.elapsed() < budget {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed().as_secs_f64());
        count += 1;
    }
    let by_cpu = rayon::current_num_threads() == 1
        && std::env::var_os("NITRO_BENCH").is_some_and(|mode| mode == "cpu");
    match (by_cpu, cpu, thread_seconds()) {
        (true, Some(from), Some(to)) if to > from => (to - from) / f64::from(count),
        _ => best,
    }
}

fn time(isa: Isa, precision: Precision, s: &Shape) -> f64 {
    let a: Vec<f32> = (0..s.m * s.k)
        .map(|i| (i % 17) as f32 * 0.1 - 0.8)
        .collect();
    let b: Vec<f32> = (0..s.k * s.n)
        .map(|i| (i % 13) as f32 * 0.1 - 0.6)
        .collect();
    let mut c = vec![0.0; s.m * s.n];
    let view = |data, rows, cols, transposed| -> MatRef<'_> {
        if transposed {
            MatRef::row_major(data, cols, rows)
                .expect("sized above")
                .t()
        } else {
            MatRef::row_major(data, rows, cols).expect("sized above")
        }
    };
    let a = view(&a, s.m, s.k, s.a_transposed);
    let b = view(&b, s.k, s.n, s.b_transposed);
    best(Duration::from_millis(250), || {
        gemm_with_isa(
            isa,
            a,
            b,
            &mut c,
            s.n,
            false,
            Epilogue::default(),
            precision,
        )
        .expect("shapes agree");
    })
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    for threads in [1, cores] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads");
        pool.install(|| {
            for isa in Isa::supported() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let cached = shape("peak", (768, 768, 768), false, true);
                    let head = format!("{} {precision:?} {threads} threads", isa.name());
                    let lines: Vec<_> = SHAPES
                        .iter()
                        .filter(|s| format!("{head} {}", s.name).contains(&filter))
                        .collect();
                    if lines.is_empty() {
                        continue;
                    }
                    let flop = |s: &Shape| 2.0 * (s.m * s.n * s.k) as f64 * 1e-9;
                    let peak = flop(&cached) / time(isa, precision, &cached);
                    println!("{head}: [768,768]x[768,768] {peak:.0} GFLOP/s");
                    for s in lines {
                        let seconds = time(isa, precision, s);
                        let rate = flop(s) / seconds;
                        println!(
                            "  {:9} [{},{}]x[{},{}]  {:8.3} ms  {rate:6.0} GFLOP/s  {:3.0} %",
                            s.name,
                            s.m,
                            s.k,
                            s.k,
                            s.n,
                            seconds * 1e3,
                            100.0 * rate / peak
                        );
                    }
                }
            }
        });
    }
}
