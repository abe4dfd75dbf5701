//! GFLOP/s of the convolutions of the autoencoders: forward, input gradient and weight gradient.
//!
//! `cargo run --release -p nitro-kernels --example conv_bench [filter]`: a filter keeps the lines that
//! contain it, such as `F32`, `tiny` or `depthwise`. Compare with the peak of `gemm_bench`.

use std::time::{Duration, Instant};

use nitro_kernels::conv::{Conv2d, PackedConv2d, conv2d_backward_input, conv2d_backward_weight};
use nitro_kernels::gemm::Epilogue;
use nitro_kernels::isa::{Isa, Precision};

/// Name, batch, size of a square image, channels in and out, kernel, stride, groups.
type Case = (
    &'static str,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
);

const CASES: [Case; 19] = [
    ("tiny", 8, 128, 3, 16, 3, 1, 1),
    ("tiny", 8, 128, 16, 16, 3, 1, 1),
    ("tiny", 8, 128, 16, 3, 3, 1, 1),
    ("tiny", 8, 128, 16, 32, 3, 2, 1),
    ("tiny", 8, 64, 32, 32, 3, 1, 1),
    ("tiny", 8, 32, 64, 64, 3, 1, 1),
    ("tiny", 8, 16, 128, 128, 3, 1, 1),
    ("pointwise", 8, 64, 32, 128, 1, 1, 1),
    ("pointwise", 8, 16, 128, 512, 1, 1, 1),
    ("depthwise", 8, 16, 1024, 1024, 3, 1, 1024),
    ("depthwise", 8, 32, 256, 256, 3, 1, 256),
    ("depthwise", 1, 64, 1536, 1536, 5, 1, 1536),
    ("groups", 8, 16, 384, 384, 1, 1, 12),
    ("groups", 1, 64, 1536, 1536, 1, 1, 48),
    ("full", 1, 512, 128, 128, 3, 1, 1),
    ("full", 1, 256, 256, 256, 3, 1, 1),
    ("full", 1, 128, 512, 512, 3, 1, 1),
    ("full", 1, 32, 1024, 1024, 3, 1, 1),
    ("full", 1, 256, 128, 256, 3, 2, 1),
];

/// Seconds this thread has spent on a core, where the system tells (Linux).
fn thread_seconds() -> Option<f64> {
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? * 1e-9)
}

/// The best of several runs, in milliseconds, spending about `budget`. With one thread and `NITRO_BENCH=cpu`
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
        (true, Some(from), Some(to)) if to > from => (to - from) / f64::from(count) * 1e3,
        _ => best * 1e3,
    }
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let budget = Duration::from_millis(200);
    println!(
        "{}: ms and GFLOP/s of forward (prepacked), input gradient, weight gradient",
        Isa::current().name()
    );
    for threads in [1, cores] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads");
        for precision in [Precision::F32, Precision::Bf16] {
            for (name, batch, size, in_channels, out_channels, kernel, stride, groups) in CASES {
                let head = format!(
                    "{precision:?} {threads} threads {name:9} [{batch},{size},{size},{in_channels}] \
                     -> {out_channels}, {kernel}x{kernel} stride {stride} groups {groups}"
                );
                if !head.contains(&filter) {
                    continue;
                }
                let conv = Conv2d {
                    batch,
                    height: size,
                    width: size,
                    in_channels,
                    out_channels,
                    kernel: [kernel, kernel],
                    stride,
                    padding: kernel / 2,
                    groups,
                };
                let fill = |count: usize| -> Vec<f32> {
                    (0..count).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect()
                };
                let (mut x, mut weight) = (fill(conv.input_len()), fill(conv.weight_len()));
                let mut out = fill(conv.output_len());
                let packed = PackedConv2d::new(&conv, &weight, precision).expect("a convolution");
                pool.install(|| {
                    let forward = best(budget, || {
                        let epilogue = Epilogue::default();
                        packed
                            .forward(&x, [batch, size, size], &mut out, false, epilogue)
                            .expect("sized above");
                    });
                    let input = best(budget, || {
                        conv2d_backward_input(&conv, &out, &weight, &mut x, precision)
                            .expect("sized above");
                    });
                    let grad = best(budget, || {
                        conv2d_backward_weight(&conv, &x, &out, &mut weight, false, precision)
                            .expect("sized above");
                    });
                    let rate = |ms: f64| conv.flop() * 1e-6 / ms;
                    println!(
                        "{head}: {forward:.2} ({:.0})  {input:.2} ({:.0})  {grad:.2} ({:.0})",
                        rate(forward),
                        rate(input),
                        rate(grad)
                    );
                });
            }
        }
    }
}
