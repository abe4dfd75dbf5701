//! CPU micro-kernels per instruction set, chosen at run time. No Burn here; the only crate where `unsafe` may appear.

pub mod attention;
pub mod error;
pub mod gemm;
pub mod isa;
pub mod pool;
pub mod norm;

mod math;
mod simd;
mod tile;
#[cfg(test)]
mod testing;
