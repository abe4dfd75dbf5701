use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::EvalError;
use crate::python_json;

/// One requirement: at least `count` objects of a class, perhaps of a colour, perhaps placed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Clause {
    /// The detector's class name.
    pub class: String,
    /// How many.
    pub count: usize,
    /// Each of them in this colour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color: Option<String>,
    /// Each of them in this relation to every object of an earlier include clause (from 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<(String, usize)>,
}

/// A prompt's line of `evaluation_metadata.jsonl`.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// The task.
    pub tag: String,
    /// The prompt.
    pub prompt: String,
    /// All of these must hold.
    pub include: Vec<Clause>,
    /// None of these may hold.
    pub exclude: Vec<Clause>,
    /// The line as it was read: records repeat it, and summaries group by it.
    source: Value,
}

#[derive(Deserialize)]
struct Fields {
    tag: String,
    prompt: String,
    #[serde(default)]
    include: Vec<Clause>,
    #[serde(default)]
    exclude: Vec<Clause>,
}

impl Metadata {
    /// Reads one JSON object. `place` says where it came from, for the error.
    ///
    /// # Errors
    /// When the text is not JSON or lacks tag or prompt.
    pub fn parse(text: &str, place: &str) -> Result<Metadata, EvalError> {
        let error = |source| EvalError::Json {
            expected: "GenEval metadata {\"tag\", \"include\", \"prompt\"}",
            path: place.to_owned(),
            source,
        };
        let source: Value = serde_json::from_str(text).map_err(error)?;
        let fields = Fields::deserialize(&source).map_err(error)?;
        Ok(Metadata {
            tag: fields.tag,
            prompt: fields.prompt,
            include: fields.include,
            exclude: fields.exclude,
            source,
        })
    }

    /// The object as Python's `json.dumps` writes it, keys in their original order.
    pub fn to_json(&self) -> String {
        python_json::dumps(&self.source).unwrap_or_default()
    }
}

/// Reads a file of one metadata object per line; blank lines are skipped.
///
/// # Errors
/// When a line is not GenEval metadata (`place` and the line number are named).
pub fn read_metadata(text: &str, place: &str) -> Result<Vec<Metadata>, EvalError> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| Metadata::parse(line, &format!("{place}, line {}", i + 1)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_line_survives() {
        let line = r#"{"tag": "position", "include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["left of", 0]}], "prompt": "x", "note": "caf\u00e9"}"#;
        let m = Metadata::parse(line, "here").unwrap();
        assert_eq!(m.to_json(), line);
        assert_eq!(m.include[1].position, Some(("left of".to_owned(), 0)));
        assert!(m.exclude.is_empty());
    }

    #[test]
    fn errors_name_the_line() {
        let text = "{\"tag\": \"t\", \"prompt\": \"p\"}\n\n{\"tag\": \"t\"}\n";
        let error = read_metadata(text, "file.jsonl").unwrap_err().to_string();
        assert!(
            error.contains("file.jsonl, line 3") && error.contains("prompt"),
            "{error}"
        );
    }
}
