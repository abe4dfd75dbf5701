//! Data: the shapes world (renderer, captions, exact judge, bench) and, later, dataset formats.
//!
//! This crate knows no model: it deals in pictures (RGB bytes), captions and verdicts.

pub mod shapes;
