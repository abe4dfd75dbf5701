//! Caption cleaning, compared as strings.

use std::fs;

use anyhow::{Context, Result};
use nitro_pipeline::caption::{clean_once, preprocess};
use serde::Deserialize;

use crate::compare::Report;
use crate::files::Case;

/// A line of `pairs.jsonl`.
#[derive(Deserialize)]
struct Pair {
    id: serde_json::Value,
    raw: String,
    cleaned: String,
    plain: String,
    clean_once: Option<String>,
}

pub(crate) fn clean(case: &Case, report: &mut Report) -> Result<()> {
    let file = case.json["files"]["pairs"]
        .as_str()
        .unwrap_or("pairs.jsonl");
    let text = fs::read_to_string(case.dir.join(file))?;
    for line in text.split('\n').filter(|line| !line.trim().is_empty()) {
        let pair: Pair = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let id = &pair.id;
        report.equal(
            &format!("{id} cleaned"),
            &preprocess(&pair.raw, true),
            &pair.cleaned,
        );
        report.equal(
            &format!("{id} plain"),
            &preprocess(&pair.raw, false),
            &pair.plain,
        );
        if let Some(once) = &pair.clean_once {
            report.equal(&format!("{id} cleaned once"), &clean_once(&pair.raw), once);
        }
    }
    Ok(())
}
