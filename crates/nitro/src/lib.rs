//! Nitro-E in Rust: pictures from text on the machine you own, and the tools to train, evaluate and
//! extend the model. No Python at run time.
//!
//! ```
//! use nitro::{MINIATURE, Pipeline, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("out.png");
//! let pipeline = Pipeline::from_pretrained(MINIATURE)?;
//! let request = Request::new("a red circle left of a blue square").steps(4).seed(7);
//! let output = pipeline.generate(&request)?;
//! output.images[0].image.save(path)?;
//! # Ok(())
//! # }
//! ```
//!
//! [`MINIATURE`] is compiled into the program; `"amd/Nitro-E"` (the official weights on the Hub) or a
//! model folder take its place. [`Pipeline::builder`] chooses variant, resolution, precision, device
//! and LoRA adapters; [`Pipeline::generate_observed`] shows every step and can stop between them.

pub mod bench;
mod embedded;

pub use embedded::MINIATURE;
pub use nitro_pipeline::*;
