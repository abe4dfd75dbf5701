//! HPSv2's benchmark: four styles of 800 prompts, a picture each, in the official folders
//! (`<style>/00000.jpg`).

use std::fmt;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use serde::{Deserialize, Serialize};

use crate::EvalError;
use crate::error::write_atomically;

/// The official styles.
pub const STYLES: [&str; 4] = ["anime", "concept-art", "paintings", "photo"];
/// Where the official prompts are on the Hub, a dataset.
pub const PROMPTS_DATASET: &str = "zhwang/HPDv2";
/// The official script averages groups of this many pictures first.
const GROUP: usize = 80;
/// Pillow's default, with which the official example saves pictures.
const JPEG_QUALITY: u8 = 75;

/// One style's prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Style {
    /// Name: of the folder, and of the file of prompts.
    pub name: String,
    /// The prompts; a prompt's number is that of its picture.
    pub prompts: Vec<String>,
}

impl Style {
    /// Reads a style's file, a JSON list of prompts.
    ///
    /// # Errors
    /// When the file cannot be read or is no such list.
    pub fn read(name: &str, path: &Path) -> Result<Self, EvalError> {
        let text = std::fs::read_to_string(path).map_err(EvalError::io("read", path))?;
        let prompts = serde_json::from_str(&text).map_err(|source| EvalError::Json {
            expected: "a list of prompts",
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            name: name.to_owned(),
            prompts,
        })
    }
}

/// The styles whose `<style>.json` are in `folder`.
///
/// # Errors
/// When there is none, or one cannot be read.
pub fn read_styles(folder: &Path) -> Result<Vec<Style>, EvalError> {
    let file = |style: &str| folder.join(format!("{style}.json"));
    let styles = STYLES.iter().filter(|style| file(style).is_file());
    let styles: Vec<Style> = styles
        .map(|style| Style::read(style, &file(style)))
        .collect::<Result<_, _>>()?;
    match styles.is_empty() {
        false => Ok(styles),
        true => Err(EvalError::NoPromptFiles {
            path: folder.to_owned(),
            names: STYLES.map(|style| format!("{style}.json")).join(", "),
        }),
    }
}

/// Where the picture of a prompt is, if it is there; `.jpg` officially, `.png` also.
pub fn picture(images: &Path, style: &str, index: usize) -> Option<PathBuf> {
    let folder = images.join(style);
    ["jpg", "png"]
        .iter()
        .map(|ending| folder.join(format!("{index:05}.{ending}")))
        .find(|file| file.is_file())
}

/// Writes a prompt's picture as the official example does.
///
/// # Errors
/// When it cannot be written.
pub fn write_picture(
    images: &Path,
    style: &str,
    index: usize,
    image: &RgbImage,
) -> Result<(), EvalError> {
    let folder = images.join(style);
    std::fs::create_dir_all(&folder).map_err(EvalError::io("create", &folder))?;
    let path = folder.join(format!("{index:05}.jpg"));
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
        .encode_image(image)
        .map_err(|source| EvalError::Picture {
            action: "write",
            path: path.clone(),
            source,
        })?;
    write_atomically(&path, bytes.get_ref())
}

/// A scored picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Style.
    pub style: String,
    /// Number of the prompt.
    pub index: usize,
    /// The prompt.
    pub prompt: String,
    /// Cosine of picture and prompt.
    pub score: f32,
}

/// The benchmark's numbers, scores times 100.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Of each style: name, pictures, mean and deviation of the means of groups of 80.
    pub styles: Vec<(String, usize, f64, f64)>,
    /// Mean over all pictures.
    pub average: f64,
}

impl Summary {
    /// Averages the records of `styles`.
    pub fn of(records: &[Record], styles: &[Style]) -> Self {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let mut all = Vec::new();
        let rows = styles.iter().map(|style| {
            let of_style = records.iter().filter(|r| r.style == style.name);
            let mut scores: Vec<(usize, f64)> = of_style
                .filter(|r| r.index < style.prompts.len())
                .map(|r| (r.index, 100.0 * f64::from(r.score)))
                .collect();
            scores.sort_by_key(|(index, _)| *index);
            let scores: Vec<f64> = scores.into_iter().map(|(_, score)| score).collect();
            let groups: Vec<f64> = scores.chunks(GROUP).map(mean).collect();
            let center = mean(&groups);
            let squares: Vec<f64> = groups.iter().map(|g| (g - center).powi(2)).collect();
            all.extend(&scores);
            (
                style.name.clone(),
                scores.len(),
                center,
                mean(&squares).sqrt(),
            )
        });
        let styles = rows.collect();
        Self {
            styles,
            average: mean(&all),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (style, count, mean, deviation) in &self.styles {
            writeln!(
                f,
                "{style:<15} {mean:.2} \t {deviation:.4} \t ({count} pictures)"
            )?;
        }
        write!(f, "{:<15} {:.2}", "Average", self.average)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styles_average_groups_of_eighty_and_the_whole_averages_pictures() {
        let styles = ["anime", "photo"].map(|name| Style {
            name: name.to_owned(),
            prompts: vec![String::new(); 120],
        });
        let record = |style: &str, index: usize, score: f32| Record {
            style: style.to_owned(),
            index,
            prompt: String::new(),
            score,
        };
        // Groups of 80 and 40: means 0.25 and 0.75.
        let mut records: Vec<Record> = (0..120)
            .map(|i| record("anime", i, if i < 80 { 0.25 } else { 0.75 }))
            .collect();
        records.reverse();
        records.push(record("photo", 0, 0.5));
        let summary = Summary::of(&records, &styles);
        assert_eq!(summary.styles[0], ("anime".to_owned(), 120, 50.0, 25.0));
        assert_eq!(summary.styles[1], ("photo".to_owned(), 1, 50.0, 0.0));
        let average = (80.0 * 25.0 + 40.0 * 75.0 + 50.0) / 121.0;
        assert!((summary.average - average).abs() < 1e-9);
    }
}
