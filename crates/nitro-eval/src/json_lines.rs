//! Records that grow prompt by prompt, one JSON object per line.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::EvalError;
use crate::error::write_atomically;

/// A file of records. Every change replaces it as a whole, so an interrupted run leaves all finished
/// prompts and no half line.
#[derive(Debug)]
pub struct JsonLines<T> {
    path: PathBuf,
    /// What a line should be, for messages.
    expected: &'static str,
    records: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> JsonLines<T> {
    /// Opens the file, or starts an empty one if there is none yet. `expected` says in messages what
    /// a line should be.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is no such record.
    pub fn open(path: &Path, expected: &'static str) -> Result<Self, EvalError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(EvalError::io("read", path)(e)),
        };
        let lines = text.lines().enumerate();
        let records = lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(i, line)| {
                serde_json::from_str(line).map_err(|source| EvalError::Json {
                    expected,
                    path: format!("{}, line {}", path.display(), i + 1),
                    source,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            path: path.to_owned(),
            expected,
            records,
        })
    }

    /// The records, in the order they were added.
    pub fn records(&self) -> &[T] {
        &self.records
    }

    /// Adds records and writes the file. One that `same` says stands for an older one takes its place.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, new: Vec<T>, same: impl Fn(&T, &T) -> bool) -> Result<(), EvalError> {
        for record in new {
            match self.records.iter_mut().find(|old| same(old, &record)) {
                Some(old) => *old = record,
                None => self.records.push(record),
            }
        }
        let mut text = String::new();
        for record in &self.records {
            let line = serde_json::to_string(record).map_err(|source| EvalError::Json {
                expected: self.expected,
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
}
