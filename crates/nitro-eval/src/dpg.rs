//! DPG-Bench's prompts and layout (TencentQQGYLab/ELLA): one file per prompt, `<id>.png`, its four
//! pictures in a square of two by two. Its scorer, mPLUG-large, is not part of this program.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{ImageFormat, RgbImage};
use serde::Deserialize;

use crate::EvalError;
use crate::error::write_atomically;

/// The official prompts, one `{"id", "prompt"}` per line.
const PROMPTS: &str = include_str!("../data/dpg_prompts.jsonl");
/// Pictures of a prompt, `PIC_NUM` of the official script.
pub const PICTURES: usize = 4;

/// One of the 1065 prompts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Prompt {
    /// Stem of the official prompt file, and of the picture.
    pub id: String,
    /// The prompt.
    pub prompt: String,
}

/// The official prompts.
pub fn prompts() -> Vec<Prompt> {
    let parse = |line| serde_json::from_str(line).expect("the built-in prompts are read by a test");
    PROMPTS.lines().map(parse).collect()
}

/// Where a prompt's pictures are.
pub fn picture(images: &Path, prompt: &Prompt) -> PathBuf {
    images.join(format!("{}.png", prompt.id))
}

/// Writes a prompt's four pictures, all of one size: the first two above, the others below.
///
/// # Errors
/// When the file cannot be written.
pub fn write_pictures(
    images: &Path,
    prompt: &Prompt,
    pictures: &[RgbImage],
) -> Result<(), EvalError> {
    let path = picture(images, prompt);
    let (width, height) = pictures.first().map_or((1, 1), RgbImage::dimensions);
    let mut sheet = RgbImage::new(2 * width, 2 * height);
    for (i, picture) in pictures.iter().take(PICTURES).enumerate() {
        let (column, row) = (i as u32 % 2, i as u32 / 2);
        let (left, top) = (i64::from(column * width), i64::from(row * height));
        image::imageops::replace(&mut sheet, picture, left, top);
    }
    let mut bytes = Cursor::new(Vec::new());
    sheet
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|source| EvalError::Picture {
            action: "write",
            path: path.clone(),
            source,
        })?;
    std::fs::create_dir_all(images).map_err(EvalError::io("create", images))?;
    write_atomically(&path, bytes.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn the_prompts_are_the_official_ones_with_different_ids() {
        let prompts = prompts();
        assert_eq!(prompts.len(), 1065);
        let ids: std::collections::HashSet<&str> = prompts.iter().map(|p| p.id.as_str()).collect();
        assert_eq!(ids.len(), 1065);
        assert!(
            prompts
                .iter()
                .all(|p| !p.id.contains(['/', '\\']) && !p.prompt.is_empty())
        );
    }

    #[test]
    fn four_pictures_become_one_square() {
        let folder = tempfile::tempdir().unwrap();
        let prompt = &prompts()[0];
        let pictures: Vec<RgbImage> = (0..4)
            .map(|i| RgbImage::from_pixel(3, 2, Rgb([i; 3])))
            .collect();
        write_pictures(folder.path(), prompt, &pictures).unwrap();
        let sheet = image::open(picture(folder.path(), prompt))
            .unwrap()
            .into_rgb8();
        assert_eq!(sheet.dimensions(), (6, 4));
        let corners = [(0, 0), (5, 0), (0, 3), (5, 3)].map(|(x, y)| sheet.get_pixel(x, y).0[0]);
        assert_eq!(corners, [0, 1, 2, 3]);
    }
}
