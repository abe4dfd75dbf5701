//! Linear layers with weights packed once, for inference.
//!
//! A [`PackedLinear`] holds one or more `torch.nn.Linear` weights in the order in which the
//! micro-kernels read them: f32, bf16, or 8-bit integers with a scale per output channel. It is read
//! straight from a file's elements ([`Rows`]), a few rows at a time.
//!
//! Products are cut by output columns: a thread takes a panel of 48 columns and multiplies *all* rows
//! of the input with it, so each weight comes from memory once, and asks for the panel after it
//! meanwhile. With the few rows of this project's models (80 to 400) that is what decides the speed.

mod activations;
pub(crate) mod memory;
mod product;
mod rows;
mod sink;
mod tile;
mod weight;

pub use memory::PackedBytes;
pub use product::packed_linear;
pub use rows::{ElementType, Rows};
pub use weight::PackedLinear;

pub(crate) use activations::{Activations, Format};
pub(crate) use product::{PACK_ROWS, Product, pack_task, pack_tasks};
pub(crate) use sink::Sink;
pub(crate) use tile::{PanelFn, PanelTile, TILE_ROWS, kernel};

/// In what form weights are packed. Bytes that were packed in one form are read in that form only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PackedForm {
    /// Kind, instruction set, precision, sizes and layout.
    pub name: String,
    /// Bytes.
    pub len: usize,
}
