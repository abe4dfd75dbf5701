//! Evaluation: GenEval's rules, result layouts, and the shapes bench.
//!
//! - [`geneval`]: what GenEval's `evaluate_images.py` and `summary_scores.py` decide once a detector
//!   has spoken, its folder layout, and its result records.
//! - [`shapes`]: the shapes bench, GenEval's rules with the exact judge of the shapes world as
//!   detector.

mod error;
pub mod geneval;
use nitro_data::python_json;
pub mod shapes;

pub use error::EvalError;
pub use geneval::{Clause, Detections, ImageResult, Metadata, Options, Results, Summary};
pub use shapes::{BenchPrompt, score_image, shapes_bench};
