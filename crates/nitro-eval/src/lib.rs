//! Evaluation: GenEval's rules, result layouts, and the shapes bench.
//!
//! - [`geneval`]: what GenEval's `evaluate_images.py` and `summary_scores.py` decide once a detector
//!   has spoken, its folder layout, and its result records.
//! - [`hps_bench`], [`reward_bench`]: the layouts and summaries of HPSv2's and ImageReward's benchmarks.
//! - [`dpg`]: DPG-Bench's prompts and layout.
//! - [`scorers`]: the models that speak: GenEval's detector and colour classifier, HPSv2.1,
//!   ImageReward; [`pixels`] and [`tokens`] prepare pictures and texts for them.
//! - [`shapes`]: the shapes bench, GenEval's rules with the exact judge of the shapes world as
//!   detector.

pub mod dpg;
mod error;
pub mod geneval;
pub mod hps_bench;
mod json_lines;
mod manifest;
pub mod pixels;
pub mod reward_bench;
pub mod scorers;
pub mod shapes;
pub mod tokens;

use nitro_data::python_json;

pub use error::EvalError;
pub use geneval::{Clause, Detections, ImageResult, Metadata, Options, Results, Summary};
pub use json_lines::JsonLines;
pub use manifest::{Manifest, ScorerManifest};
pub use shapes::{BenchPrompt, score_image, shapes_bench};
