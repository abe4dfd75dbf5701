//! GenEval: prompts with what a picture must and must not show, judged from detections.
//!
//! Source of the rules: djghosh13/geneval, `evaluation/evaluate_images.py` and
//! `evaluation/summary_scores.py`; constants as there. [`evaluate_image`] takes what any detector found;
//! [`Judge`] brings GenEval's own.

mod judge;
mod layout;
mod metadata;
pub mod official;
mod results;
mod rules;
mod summary;

pub use judge::Judge;
pub use layout::{PromptFolder, prompt_folders, read_rgb, write_prompt_folder};
pub use metadata::{Clause, Metadata, read_metadata};
pub use results::{ImageResult, Results};
pub use rules::{Detections, Kept, Options, Verdict, evaluate, evaluate_image, keep, relations};
pub use summary::{Summary, TaskScore};

/// GenEval's colour words, in the order of its colour classifier.
pub const COLORS: [&str; 10] = [
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
];
