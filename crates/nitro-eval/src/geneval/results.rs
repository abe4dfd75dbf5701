use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Kept, Metadata, Verdict};
use crate::error::write_atomically;
use crate::{EvalError, python_json};

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

/// A `results.jsonl` that grows prompt by prompt. Every [`Results::add`] replaces the file as a
/// whole, so an interrupted run leaves all finished prompts and no half line.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    records: Vec<ImageResult>,
    known: HashSet<String>,
}

impl Results {
    /// Opens the file, or starts an empty one if there is none yet.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not a result record.
    pub fn open(path: &Path) -> Result<Results, EvalError> {
        let records = match std::fs::read_to_string(path) {
            Ok(text) => Results::parse(&text, path)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(EvalError::io("read", path)(e)),
        };
        let known = records.iter().map(|r| r.filename.clone()).collect();
        Ok(Results {
            path: path.to_owned(),
            records,
            known,
        })
    }

    fn parse(text: &str, path: &Path) -> Result<Vec<ImageResult>, EvalError> {
        text.lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(i, line)| {
                serde_json::from_str(line).map_err(|source| EvalError::Json {
                    expected: "a result record {\"filename\", \"tag\", \"prompt\", \"correct\", ...}",
                    path: format!("{}, line {}", path.display(), i + 1),
                    source,
                })
            })
            .collect()
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
        for record in records {
            if self.known.insert(record.filename.clone()) {
                self.records.push(record);
            } else if let Some(old) = self
                .records
                .iter_mut()
                .find(|r| r.filename == record.filename)
            {
                *old = record;
            }
        }
        let mut text = String::new();
        for record in &self.records {
            let line = serde_json::to_string(record).map_err(|source| EvalError::Json {
                expected: "a record that can be written",
                path: self.path.display().to_string(),
                source,
            })?;
            text += &line;
            text.push('\n');
        }
        if let Some(folder) = self.path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(EvalError::io("create", folder))?;
        }
        write_atomically(&self.path, text.as_bytes())
    }

    /// All records, in the order they were added.
    pub fn records(&self) -> &[ImageResult] {
        &self.records
    }
}
