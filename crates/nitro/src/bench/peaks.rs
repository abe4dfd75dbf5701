//! What the machine can do at most.

use nitro_kernels::isa::Isa;
use nitro_kernels::peak::{Product, instruction, memory_bandwidth, operations_per_second};
use nitro_kernels::pool::num_threads;
use nitro_ops::Precision;
use serde::Serialize;

/// A rate on one thread, and on all that are used.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// The instruction that was run.
    pub instruction: &'static str,
    /// 10^9 operations per second on one thread.
    pub one_thread: f64,
    /// The same on all threads together.
    pub all_threads: f64,
}

/// Bandwidth of the memory behind the caches, in 10^9 bytes per second.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryPeak {
    /// Reading, one thread.
    pub read_one_thread: f64,
    /// Reading, all threads.
    pub read_all_threads: f64,
    /// Copying, one thread; bytes read and written both count.
    pub copy_one_thread: f64,
    /// Copying, all threads.
    pub copy_all_threads: f64,
}

/// The machine's peaks. A kind of product for which the instruction set in use has no instruction is
/// `None`.
#[derive(Clone, Debug, Serialize)]
pub struct Peaks {
    /// GFLOP/s of f32 multiply-adds.
    pub f32: Option<Rate>,
    /// GFLOP/s of bf16 dot products.
    pub bf16: Option<Rate>,
    /// 10^9 operations per second of 8-bit dot products.
    pub int8: Option<Rate>,
    /// GB/s.
    pub memory: MemoryPeak,
}

impl Peaks {
    /// Measures them: about three seconds.
    pub fn measure() -> Self {
        let isa = Isa::current();
        let threads = num_threads();
        let rate = |product| {
            Some(Rate {
                instruction: instruction(product, isa)?,
                one_thread: operations_per_second(product, isa, 1)? / 1e9,
                all_threads: operations_per_second(product, isa, threads)? / 1e9,
            })
        };
        let (one, all) = (memory_bandwidth(1), memory_bandwidth(threads));
        Self {
            f32: rate(Product::F32),
            bf16: rate(Product::Bf16),
            int8: rate(Product::Int8),
            memory: MemoryPeak {
                read_one_thread: one.read / 1e9,
                read_all_threads: all.read / 1e9,
                copy_one_thread: one.copy / 1e9,
                copy_all_threads: all.copy / 1e9,
            },
        }
    }

    /// The peak that stages of this precision are held against, in GFLOP/s: that of the instruction
    /// its products are computed with.
    pub fn of(&self, precision: Precision) -> Option<f64> {
        let rate = match precision {
            Precision::F32 => None,
            Precision::Bf16 => self.bf16.as_ref(),
            Precision::Int8 => self.int8.as_ref(),
        };
        rate.or(self.f32.as_ref()).map(|rate| rate.all_threads)
    }
}
