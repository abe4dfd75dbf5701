//! What a folder's pictures and scores were made with, so that a resumed run goes on with the same.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::EvalError;
use crate::error::write_atomically;

/// The settings a folder's pictures were made with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of the checkpoint.
    pub checkpoint: String,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of each of a prompt's pictures, or one from which all of them are drawn together.
    pub seeds: Vec<u64>,
}

impl Manifest {
    /// Takes the folder for this run: writes `manifest.json`, or finds the same one there and resumes.
    ///
    /// # Errors
    /// When the folder holds pictures made under other settings, or cannot be written.
    pub fn claim(&self, images: &Path) -> Result<(), EvalError> {
        claim(self, &images.join("manifest.json"))
    }
}

/// What a results file was scored with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScorerManifest {
    /// Name of the benchmark.
    pub benchmark: String,
    /// SHA-256 of each model's weights.
    pub weights: BTreeMap<String, String>,
    /// How products were computed.
    pub precision: String,
}

impl ScorerManifest {
    /// Takes the folder's results for this run: writes `scorer.json`, or finds the same one there.
    ///
    /// # Errors
    /// When the results were made with other scorers, or the folder cannot be written.
    pub fn claim(&self, results: &Path) -> Result<(), EvalError> {
        claim(self, &results.join("scorer.json"))
    }
}

fn claim<T>(wanted: &T, path: &Path) -> Result<(), EvalError>
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    let json = |value: &T| serde_json::to_string_pretty(value).unwrap_or_default();
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let found: T = serde_json::from_str(&text).map_err(|source| EvalError::Json {
                expected: "the settings of an earlier run",
                path: path.display().to_string(),
                source,
            })?;
            match found == *wanted {
                true => Ok(()),
                false => Err(EvalError::OtherRun {
                    path: path.to_owned(),
                    found: json(&found),
                    wanted: json(wanted),
                }),
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(Path::new(""));
            std::fs::create_dir_all(folder).map_err(EvalError::io("create", folder))?;
            write_atomically(path, json(wanted).as_bytes())
        }
        Err(e) => Err(EvalError::io("read", path)(e)),
    }
}
