//! What the machine can do at most: the rate of its multiply-add instructions on registers, and the
//! bandwidth of its memory. Kernels are judged against these.

use std::hint::black_box;
use std::time::Instant;

use crate::isa::Isa;
use crate::pool::{SharedPtr, num_threads, par_for};

/// A kind of multiply-add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Product {
    /// f32 times f32, summed in f32.
    F32,
    /// Dot products of bf16 pairs, summed in f32.
    Bf16,
    /// Dot products of runs of four 8-bit integers, summed in i32.
    Int8,
}

/// A run of one kind of instruction: how many operations a round makes (a multiply-add is two), and
/// the function that makes rounds.
#[derive(Clone, Copy)]
struct Spin {
    instruction: &'static str,
    operations: u64,
    run: fn(u64),
}

/// Seconds that one measurement aims at; several are made and the best is taken.
const SECONDS: f64 = 0.02;
const MEASUREMENTS: usize = 7;

/// Bytes of each array that is streamed through: far more than any cache.
const STREAM_BYTES: usize = 256 << 20;
/// Bytes that a thread streams before it takes more.
const STREAM_TASK: usize = 4 << 20;

/// The instruction by which `isa` computes such products, as it is written in assembly; `None` where
/// it has none of its own (the kernels then compute in f32).
pub fn instruction(product: Product, isa: Isa) -> Option<&'static str> {
    spin(product, isa).map(|spin| spin.instruction)
}

/// The most operations per second that `threads` threads reach with `isa`'s instruction for `product`;
/// `None` where it has none.
///
/// Threads are those of the pool that the caller runs in; more than it has are not used.
pub fn operations_per_second(product: Product, isa: Isa, threads: usize) -> Option<f64> {
    let spin = spin(product, isa)?;
    // Rounds of about a quarter of a measurement: tasks of unequal speed then balance.
    let mut rounds = 1000;
    loop {
        let begun = Instant::now();
        (spin.run)(rounds);
        if begun.elapsed().as_secs_f64() > SECONDS / 8.0 {
            break;
        }
        rounds *= 2;
    }
    let threads = threads.clamp(1, num_threads());
    let tasks = 4 * threads;
    let work = (tasks as u64 * rounds * spin.operations) as f64;
    Some(best_rate(work, || {
        run_on(threads, tasks, |_| (spin.run)(rounds))
    }))
}

/// Bandwidth of the memory behind the caches, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Reading alone.
    pub read: f64,
    /// Copying; bytes read and bytes written both count.
    pub copy: f64,
}

/// The bandwidth that `threads` threads of the caller's pool reach together. Takes half a gibibyte of
/// memory while it runs.
pub fn memory_bandwidth(threads: usize) -> Bandwidth {
    let threads = threads.clamp(1, num_threads());
    let count = STREAM_BYTES / size_of::<u64>();
    let task = STREAM_TASK / size_of::<u64>();
    let from = vec![1_u64; count];
    let mut to = vec![0_u64; count];
    let tasks = count.div_ceil(task);
    let range = |i: usize| i * task..count.min((i + 1) * task);
    let read = best_rate(STREAM_BYTES as f64, || {
        run_on(threads, tasks, |i| {
            black_box(sum(&from[range(i)]));
        });
    });
    let target = SharedPtr(to.as_mut_ptr());
    let copy = best_rate(2.0 * STREAM_BYTES as f64, || {
        run_on(threads, tasks, |i| {
            let range = range(i);
            // SAFETY: the ranges of different tasks do not overlap and lie within `to`, which
            // outlives the parallel call and is not used otherwise meanwhile.
            let part = unsafe {
                std::slice::from_raw_parts_mut(target.get().add(range.start), range.len())
            };
            part.copy_from_slice(&from[range]);
        });
    });
    black_box(&to);
    Bandwidth { read, copy }
}

/// A sum in enough separate parts that additions do not wait for each other.
fn sum(values: &[u64]) -> u64 {
    let mut parts = [0_u64; 32];
    for chunk in values.chunks_exact(32) {
        for (part, value) in parts.iter_mut().zip(chunk) {
            *part = part.wrapping_add(*value);
        }
    }
    parts.iter().fold(0, |sum, part| sum.wrapping_add(*part))
}

/// Runs the tasks on the caller's thread, or on all of the pool's threads as `threads` says; numbers
/// between are given by pools of that size.
fn run_on(threads: usize, tasks: usize, f: impl Fn(usize) + Sync) {
    if threads == 1 {
        (0..tasks).for_each(f);
    } else {
        par_for(tasks, f);
    }
}

/// `work` over the shortest of several times.
fn best_rate(work: f64, run: impl Fn()) -> f64 {
    run();
    let best = (0..MEASUREMENTS)
        .map(|_| {
            let begun = Instant::now();
            run();
            begun.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    work / best.max(1e-9)
}

/// The function for this product and instruction set, if the machine can run it.
fn spin(product: Product, isa: Isa) -> Option<Spin> {
    if !isa.is_supported() {
        return None;
    }
    match (isa, product) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Product::F32) => Some(x86::AVX512_F32),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, Product::Bf16) => Some(x86::AVX512_BF16),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Product::Int8) => {
            std::arch::is_x86_feature_detected!("avx512vnni").then_some(x86::AVX512_INT8)
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Product::F32) => Some(x86::AVX2_F32),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Product::Int8) => Some(x86::AVX2_INT8),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, Product::F32) => Some(neon::NEON_F32),
        (Isa::Portable, Product::F32) => Some(PORTABLE_F32),
        _ => None,
    }
}

/// Defines a [`Spin`] of `$count` accumulators that live in registers: more than the product of
/// latency and throughput of any multiply-add so far, and as many as the kernels' tiles have.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! spin {
    ($constant:ident, $safe:ident, $kernel:ident, $features:literal, $instruction:literal,
     $count:literal x $lanes:literal lanes of $depth:literal, $zero:expr, $operands:expr,
     |$acc:ident, $a:ident, $b:ident| $step:expr) => {
        pub(super) const $constant: Spin = Spin {
            instruction: $instruction,
            operations: 2 * $depth * $lanes * $count,
            run: $safe,
        };

        fn $safe(rounds: u64) {
            // SAFETY: `spin` gives this function only where the machine has these features.
            unsafe { $kernel(rounds) }
        }

        #[target_feature(enable = $features)]
        fn $kernel(rounds: u64) {
            // Through `black_box`, so that the products are not computed while compiling.
            let ($a, $b) = black_box($operands);
            let mut accumulators = [$zero; $count];
            for _ in 0..rounds {
                for accumulator in &mut accumulators {
                    let $acc = *accumulator;
                    *accumulator = $step;
                }
            }
            black_box(accumulators);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Spin, black_box};
    use std::arch::x86_64::*;

    spin!(
        AVX512_F32, avx512_f32, avx512_f32_kernel,
        "avx512f", "vfmadd231ps zmm",
        24 x 16 lanes of 1,
        _mm512_setzero_ps(), (_mm512_set1_ps(1.5e-3), _mm512_set1_ps(-0.5e-3)),
        |acc, a, b| _mm512_fmadd_ps(a, b, acc)
    );

    spin!(
        AVX512_BF16, avx512_bf16, avx512_bf16_kernel,
        "avx512f,avx512bf16", "vdpbf16ps zmm",
        24 x 16 lanes of 2,
        _mm512_setzero_ps(),
        (
            _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.5e-3), _mm512_set1_ps(-2.5e-3)),
            _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5e-3), _mm512_set1_ps(3.5e-3))
        ),
        |acc, a, b| _mm512_dpbf16_ps(acc, a, b)
    );

    spin!(
        AVX512_INT8, avx512_int8, avx512_int8_kernel,
        "avx512f,avx512vnni", "vpdpbusd zmm",
        24 x 16 lanes of 4,
        _mm512_setzero_si512(), (_mm512_set1_epi32(0x0703_0501), _mm512_set1_epi32(0x02fd_04fb)),
        |acc, a, b| _mm512_dpbusd_epi32(acc, a, b)
    );

    spin!(
        AVX2_F32, avx2_f32, avx2_f32_kernel,
        "avx2,fma", "vfmadd231ps ymm",
        12 x 8 lanes of 1,
        _mm256_setzero_ps(), (_mm256_set1_ps(1.5e-3), _mm256_set1_ps(-0.5e-3)),
        |acc, a, b| _mm256_fmadd_ps(a, b, acc)
    );

    // Products of pairs are summed in 16 bits, pairs of those in 32, and then added. The accumulator
    // takes part in the first operand, or the compiler would compute the product once.
    spin!(
        AVX2_INT8, avx2_int8, avx2_int8_kernel,
        "avx2", "vpmaddubsw + vpmaddwd + vpaddd ymm",
        8 x 8 lanes of 4,
        _mm256_setzero_si256(), (_mm256_set1_epi32(0x0703_0501), _mm256_set1_epi16(1)),
        |acc, a, b| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, acc), b))
    );
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{Spin, black_box};
    use std::arch::aarch64::*;

    spin!(
        NEON_F32, neon_f32, neon_f32_kernel,
        "neon", "fmla v.4s",
        24 x 4 lanes of 1,
        vdupq_n_f32(0.0), (vdupq_n_f32(1.5e-3), vdupq_n_f32(-0.5e-3)),
        |acc, a, b| vfmaq_f32(acc, a, b)
    );
}

/// Accumulators of the portable form: a multiple of every vector's lanes.
const PORTABLE: usize = 64;

const PORTABLE_F32: Spin = Spin {
    instruction: "multiply, add",
    operations: 2 * PORTABLE as u64,
    run: portable_f32,
};

fn portable_f32(rounds: u64) {
    let (a, b) = black_box((0.999_f32, 0.5e-3_f32));
    let mut accumulators = [0.0_f32; PORTABLE];
    for _ in 0..rounds {
        for accumulator in &mut accumulators {
            *accumulator = *accumulator * a + b;
        }
    }
    black_box(accumulators);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_supported_set_has_an_f32_rate_and_names_what_it_runs() {
        for isa in Isa::supported() {
            assert!(instruction(Product::F32, isa).is_some(), "{isa:?}");
            for product in [Product::F32, Product::Bf16, Product::Int8] {
                if let Some(spin) = spin(product, isa) {
                    assert!(spin.operations > 0);
                    (spin.run)(3);
                }
            }
        }
        assert_eq!(instruction(Product::Bf16, Isa::Portable), None);
    }

    #[test]
    fn rates_are_numbers() {
        let rate = operations_per_second(Product::F32, Isa::current(), 1);
        assert!(rate.is_some_and(|rate| rate.is_finite() && rate > 0.0));
    }
}
