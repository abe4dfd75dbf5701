//! CPU micro-kernels per instruction set, chosen at run time. No Burn here; the only crate where `unsafe` may appear.

pub mod error;
pub mod gemm;
pub mod isa;
pub mod pool;
pub mod norm;

mod math;
mod simd;
#[cfg(test)]
mod testing;
