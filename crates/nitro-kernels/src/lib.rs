//! CPU micro-kernels per instruction set, chosen at run time. No Burn here; the only crate where `unsafe` may appear.

pub mod attention;
pub mod conv;
pub mod deformable;
pub mod efficientvit;
pub mod elementwise;
pub mod error;
pub mod gelu;
pub mod gemm;
pub mod isa;
pub mod mapped_file;
pub mod norm;
pub mod optim;
pub mod packed;
pub mod peak;
pub mod pool;
pub mod resample;
pub mod transformer;

mod math;
mod parallel;
mod simd;
#[cfg(test)]
mod testing;
mod tile;
