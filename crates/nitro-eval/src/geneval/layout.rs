//! GenEval's folder: `00000/metadata.jsonl`, `00000/samples/0000.png`, perhaps `00000/grid.png`.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use super::Metadata;
use crate::EvalError;
use crate::error::write_atomically;

/// Empty pixels around each picture of a grid, as torchvision's `make_grid` leaves them.
const GRID_PADDING: usize = 2;

/// One prompt's folder.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptFolder {
    /// `<images>/<number>`.
    pub path: PathBuf,
    /// Its `metadata.jsonl`.
    pub metadata: Metadata,
    /// Its pictures, by number.
    pub samples: Vec<PathBuf>,
}

/// Lists the prompt folders of `images`, by number; other folders and files are passed over.
///
/// # Errors
/// When a folder cannot be read, its metadata is not GenEval's, or there is no prompt folder.
pub fn prompt_folders(images: &Path) -> Result<Vec<PromptFolder>, EvalError> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let folders = entries(images, |name, path| digits(name) && path.is_dir())?;
    if folders.is_empty() {
        return Err(EvalError::NoPrompts {
            path: images.to_owned(),
        });
    }
    folders
        .into_iter()
        .map(|path| {
            let file = path.join("metadata.jsonl");
            let text = std::fs::read_to_string(&file).map_err(EvalError::io("read", &file))?;
            let metadata = Metadata::parse(&text, &file.display().to_string())?;
            let samples = entries(&path.join("samples"), |name, path| {
                name.strip_suffix(".png").is_some_and(digits) && path.is_file()
            })?;
            Ok(PromptFolder {
                path,
                metadata,
                samples,
            })
        })
        .collect()
}

/// Entries whose name (all digits, perhaps with a suffix) and path are wanted, by number.
fn entries(folder: &Path, wanted: impl Fn(&str, &Path) -> bool) -> Result<Vec<PathBuf>, EvalError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(EvalError::io("read", folder))? {
        let path = entry.map_err(EvalError::io("read", folder))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        if wanted(name, &path) {
            let number = name
                .trim_end_matches(".png")
                .trim_start_matches('0')
                .to_owned();
            found.push((number.len(), number, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, _, path)| path).collect())
}

/// Reads a picture as RGB bytes, with its width and height.
///
/// # Errors
/// When it cannot be read or decoded.
pub fn read_rgb(path: &Path) -> Result<(Vec<u8>, usize, usize), EvalError> {
    let picture = image::open(path)
        .map_err(|source| EvalError::Picture {
            action: "read",
            path: path.to_owned(),
            source,
        })?
        .into_rgb8();
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Ok((picture.into_raw(), width, height))
}

/// Writes one prompt's folder: the samples (each `height * width * 3` RGB bytes), `grid.png` if
/// asked for, and last `metadata.jsonl`, so that a folder with metadata is complete.
///
/// # Errors
/// When a sample has the wrong size, or something cannot be written.
pub fn write_prompt_folder(
    images: &Path,
    index: usize,
    metadata: &Metadata,
    samples: &[Vec<u8>],
    (width, height): (usize, usize),
    grid: bool,
) -> Result<(), EvalError> {
    let folder = images.join(format!("{index:05}"));
    let pictures = folder.join("samples");
    std::fs::create_dir_all(&pictures).map_err(EvalError::io("create", &pictures))?;
    for (i, rgb) in samples.iter().enumerate() {
        write_png(&pictures.join(format!("{i:04}.png")), rgb, width, height)?;
    }
    if grid && !samples.is_empty() {
        let pad = GRID_PADDING;
        let (gw, gh) = (pad + samples.len() * (width + pad), height + 2 * pad);
        let mut sheet = vec![0u8; gw * gh * 3];
        for (i, rgb) in samples.iter().enumerate() {
            let left = pad + i * (width + pad);
            for (y, line) in rgb.chunks_exact(width * 3).enumerate() {
                let at = ((y + pad) * gw + left) * 3;
                sheet[at..at + line.len()].copy_from_slice(line);
            }
        }
        write_png(&folder.join("grid.png"), &sheet, gw, gh)?;
    }
    write_atomically(
        &folder.join("metadata.jsonl"),
        metadata.to_json().as_bytes(),
    )
}

impl PromptFolder {
    /// Whether prompt `index` has been written with this metadata and at least `samples` pictures:
    /// an interrupted run skips it.
    pub fn is_complete(images: &Path, index: usize, metadata: &Metadata, samples: usize) -> bool {
        let folder = images.join(format!("{index:05}"));
        let same = std::fs::read_to_string(folder.join("metadata.jsonl"))
            .is_ok_and(|text| text.trim_end() == metadata.to_json());
        same && (0..samples).all(|i| folder.join(format!("samples/{i:04}.png")).is_file())
    }
}

fn write_png(path: &Path, rgb: &[u8], width: usize, height: usize) -> Result<(), EvalError> {
    let expected = width * height * 3;
    if rgb.len() != expected {
        let what = path.display().to_string();
        return Err(EvalError::PixelCount {
            what,
            width,
            height,
            expected,
            actual: rgb.len(),
        });
    }
    let mut bytes = Cursor::new(Vec::new());
    image::write_buffer_with_format(
        &mut bytes,
        rgb,
        width as u32,
        height as u32,
        image::ExtendedColorType::Rgb8,
        image::ImageFormat::Png,
    )
    .map_err(|source| EvalError::Picture {
        action: "write",
        path: path.to_owned(),
        source,
    })?;
    write_atomically(path, bytes.get_ref())
}
