//! ImageReward's benchmark: pictures `<id>_<k>.png` of prompts with ids, and its result records.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::EvalError;
use crate::error::write_atomically;

/// A line of `benchmark-prompts.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Prompt {
    /// Start of its pictures' names.
    pub id: String,
    /// The prompt.
    pub prompt: String,
}

/// Reads `benchmark-prompts.json`, a list of `{"id", "prompt"}`.
///
/// # Errors
/// When the file cannot be read, is no such list, or an id is no part of a file name.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>, EvalError> {
    let text = std::fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    let json = |source| EvalError::Json {
        expected: "a list of prompts {\"id\", \"prompt\"}",
        path: path.display().to_string(),
        source,
    };
    let prompts: Vec<Prompt> = serde_json::from_str(&text).map_err(json)?;
    let bad = |id: &str| id.is_empty() || id.contains(['/', '\\']);
    match prompts.iter().find(|p| bad(&p.id)) {
        None => Ok(prompts),
        Some(p) => Err(json(serde::de::Error::custom(format!(
            "the id {:?} cannot be part of a file name",
            p.id
        )))),
    }
}

/// Where picture `number` of a prompt is.
pub fn picture(images: &Path, id: &str, number: usize) -> PathBuf {
    images.join(format!("{id}_{number}.png"))
}

/// A scored prompt, as the official script writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The prompt's id.
    pub id: String,
    /// The prompt.
    pub prompt: String,
    /// Mean of the rewards.
    pub mean_score: f64,
    /// Of each picture.
    pub rewards: Vec<f32>,
}

impl Record {
    /// The record of a prompt's pictures.
    pub fn new(prompt: &Prompt, rewards: Vec<f32>) -> Self {
        let sum: f64 = rewards.iter().copied().map(f64::from).sum();
        Self {
            id: prompt.id.clone(),
            prompt: prompt.prompt.clone(),
            mean_score: sum / rewards.len().max(1) as f64,
            rewards,
        }
    }
}

/// The benchmark's score: the mean over prompts. Zero without any.
pub fn score(records: &[Record]) -> f64 {
    records.iter().map(|r| r.mean_score).sum::<f64>() / records.len().max(1) as f64
}

/// Writes the official result file, a list of records indented by four.
///
/// # Errors
/// When it cannot be written.
pub fn write_results(path: &Path, records: &[&Record]) -> Result<(), EvalError> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    records
        .serialize(&mut serializer)
        .map_err(|source| EvalError::Json {
            expected: "records that can be written",
            path: path.display().to_string(),
            source,
        })?;
    write_atomically(path, &bytes)
}
