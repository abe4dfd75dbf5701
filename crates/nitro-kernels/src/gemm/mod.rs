//! Matrix products over f32 memory, in f32 or bf16 arithmetic, for every shape the models use.
//!
//! `C = act((C if accumulating) + A B + bias)`. Operands are views with any strides, so
//! the three products of a linear layer need no copies: forward `X W^T`, input gradient `dY W`, weight
//! gradient `dY^T X`. Operands are packed into panels on the way (and rounded to bf16 there), C stays
//! row major. Work is shared over the rayon pool of the caller; for a given number of threads results
//! are the same from run to run.

mod convert;
mod driver;
mod epilogue;
mod kernel;
#[cfg(target_arch = "aarch64")]
mod kernel_neon;
mod kernel_portable;
#[cfg(target_arch = "x86_64")]
mod kernel_x86;
mod matrix;
mod pack;
mod prepacked;
mod sums;

pub use driver::{gemm, gemm_by_rows, gemm_with_isa};
pub use epilogue::{Activation, Epilogue};
pub use matrix::MatRef;
pub use prepacked::{PackedB, gemm_packed};
pub use sums::column_sum;

pub(crate) use convert::{Interleave, convert_run, interleave, interleave_rows, transpose16};
pub(crate) use driver::{Finish, Part, Target, run_part, run_rows, serial};
pub(crate) use epilogue::{apply_with_isa, fma};
#[cfg(target_arch = "x86_64")]
pub(crate) use kernel::Unit;
pub(crate) use kernel::{KernelSet, LANES, MAX_ROWS, Tile};
pub(crate) use pack::{Layout, MAX_BLOCK_UNITS, pack_b};
