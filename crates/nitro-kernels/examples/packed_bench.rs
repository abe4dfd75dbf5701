//! Speed of packed linear layers on the shapes of E-MMDiT (width 768) and Llama 1B.
//!
//! `cargo run --release -p nitro-kernels --example packed_bench [f32|bf16|int8]`

use std::time::Instant;

use nitro_kernels::gemm::Activation;
use nitro_kernels::isa::Precision;
use nitro_kernels::packed::{ElementType, PackedLinear, Rows, packed_linear};
use nitro_kernels::pool;

fn main() {
    let precision = match std::env::args().nth(1).as_deref() {
        Some("f32") => Precision::F32,
        Some("int8") => Precision::Int8,
        _ => Precision::Bf16,
    };
    pool::install(|| {
        println!("{precision:?}, {} threads", pool::num_threads());
        for (m, n, k) in [
            (80, 2304, 768),
            (80, 768, 768),
            (80, 768, 2304),
            (128, 2304, 768),
            (256, 2304, 768),
            (256, 768, 768),
            (256, 768, 2304),
            (2048, 2304, 768),
            (128, 3072, 2048),
            (128, 8192, 2048),
            (128, 2048, 8192),
        ] {
            measure(m, n, k, precision);
        }
        packing(precision);
    });
}

fn measure(m: usize, n: usize, k: usize, precision: Precision) {
    // As many layers as leave no weight in a cache, as in a model.
    let count = (256 << 20) / (n * k * 2).max(1) + 1;
    let weight: Vec<f32> = (0..n * k)
        .map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5)
        .collect();
    let x: Vec<f32> = (0..m * k)
        .map(|i| (i * 31 % 97) as f32 / 97.0 - 0.5)
        .collect();
    let rows = Rows::from_f32(&weight, n, k).expect("the shape is its own");
    let layers: Vec<PackedLinear> = (0..count)
        .map(|_| PackedLinear::new(&[rows], None, precision).expect("one layer"))
        .collect();
    let mut out = vec![0.0; m * n];
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let begun = Instant::now();
        for layer in &layers {
            packed_linear(layer, &x, Activation::None, &mut out).expect("shapes fit");
        }
        best = best.min(begun.elapsed().as_secs_f64() / count as f64);
    }
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    println!(
        "{m:5} x {n:5} x {k:5}  {:8.1} us  {:7.1} GFLOP/s",
        best * 1e6,
        flops / best / 1e9
    );
}

/// How fast a file's bf16 elements become packed weights.
fn packing(precision: Precision) {
    let (n, k, count) = (8192, 2048, 8);
    let bytes: Vec<u8> = (0..n * k * 2)
        .map(|i| {
            if i % 2 == 0 {
                (i * 7919 % 251) as u8
            } else {
                0x3c
            }
        })
        .collect();
    let rows = Rows::new(&bytes, ElementType::Bf16, n, k).expect("the shape is its own");
    let begun = Instant::now();
    let layers: Vec<PackedLinear> = (0..count)
        .map(|_| PackedLinear::new(&[rows], None, precision).expect("one layer"))
        .collect();
    let seconds = begun.elapsed().as_secs_f64();
    let weights = (layers.len() * n * k) as f64;
    println!("packing: {:.0} million weights/s", weights / seconds / 1e6);
}
