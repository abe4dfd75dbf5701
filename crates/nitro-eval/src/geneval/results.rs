use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Kept, Metadata, Verdict};
use crate::{EvalError, JsonLines, python_json};

/// One line of GenEval's `results.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageResult {
    /// The picture.
    pub filename: String,
    /// The task.
    pub tag: String,
    /// The prompt.
    pub prompt: String,
    /// Whether the picture shows what the prompt asks.
    pub correct: bool,
    /// If not, why.
    pub reason: String,
    /// The prompt's metadata, as a JSON string.
    pub metadata: String,
    /// The boxes that counted, `{class: [[x0, y0, x1, y1, confidence]]}`, as a JSON string.
    pub details: String,
}

impl ImageResult {
    /// The record of one judged picture.
    pub fn new(
        filename: &str,
        metadata: &Metadata,
        verdict: Verdict,
        kept: &[(String, Vec<Kept>)],
    ) -> ImageResult {
        let details: Map<String, Value> = kept
            .iter()
            .map(|(class, objects)| {
                let boxes: Vec<Value> = objects
                    .iter()
                    .map(|k| {
                        k.scored
                            .iter()
                            .map(|&v| Value::from(f64::from(v)))
                            .collect()
                    })
                    .collect();
                (class.clone(), Value::from(boxes))
            })
            .collect();
        ImageResult {
            filename: filename.to_owned(),
            tag: metadata.tag.clone(),
            prompt: metadata.prompt.clone(),
            correct: verdict.correct,
            reason: verdict.reason,
            metadata: metadata.to_json(),
            details: python_json::dumps(&details).unwrap_or_default(),
        }
    }
}

/// A `results.jsonl` that grows prompt by prompt.
#[derive(Debug)]
pub struct Results {
    lines: JsonLines<ImageResult>,
    known: HashSet<String>,
}

impl Results {
    /// Opens the file, or starts an empty one if there is none yet.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not a result record.
    pub fn open(path: &Path) -> Result<Results, EvalError> {
        const EXPECTED: &str =
            "a result record {\"filename\", \"tag\", \"prompt\", \"correct\", ...}";
        let lines: JsonLines<ImageResult> = JsonLines::open(path, EXPECTED)?;
        let known = lines.records().iter().map(|r| r.filename.clone());
        Ok(Results {
            known: known.collect(),
            lines,
        })
    }

    /// Whether this picture has been judged.
    pub fn contains(&self, filename: &str) -> bool {
        self.known.contains(filename)
    }

    /// Adds records (a prompt's, say) and writes the file. A picture judged before keeps its place
    /// and gets the new record.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, records: Vec<ImageResult>) -> Result<(), EvalError> {
        self.known
            .extend(records.iter().map(|r| r.filename.clone()));
        self.lines.add(records, |a, b| a.filename == b.filename)
    }

    /// All records, in the order they were added.
    pub fn records(&self) -> &[ImageResult] {
        self.lines.records()
    }
}
