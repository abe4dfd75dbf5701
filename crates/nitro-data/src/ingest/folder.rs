use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Content, Payload, Record, Skip, Source, files_below, is_picture, listing};
use crate::{DataError, Result};

/// A folder of pictures, at any depth, each with a caption file.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    captions: Option<PathBuf>,
    extension: String,
    files: Vec<PathBuf>,
}

/// Files in a unit.
const UNIT: usize = 1024;

impl Folder {
    /// Pictures below `root`. Captions stand beside them, or all in the folder `captions` (SA-1B),
    /// under the picture's name up to its first dot with `extension` (`txt`).
    pub fn open(root: &Path, captions: Option<&Path>, extension: &str) -> Result<Self> {
        let files = files_below(root, is_picture)?;
        if files.is_empty() {
            return Err(DataError::Source {
                path: root.to_owned(),
                reason: "holds no jpg, jpeg, png or webp files".to_owned(),
            });
        }
        Ok(Self {
            root: root.to_owned(),
            captions: captions.map(Path::to_owned),
            extension: extension.trim_start_matches('.').to_owned(),
            files,
        })
    }

    fn range(&self, unit: usize) -> Range<usize> {
        unit * UNIT..((unit + 1) * UNIT).min(self.files.len())
    }
}

/// The caption file of a picture.
pub(super) fn caption_file(picture: &Path, captions: Option<&Path>, extension: &str) -> PathBuf {
    match captions {
        None => picture.with_extension(extension),
        Some(folder) => {
            let name = picture.file_name().unwrap_or_default().to_string_lossy();
            let stem = name.split('.').next().unwrap_or_default();
            folder.join(format!("{stem}.{extension}"))
        }
    }
}

/// What a caption file says.
pub(super) fn read_caption(path: &Path) -> std::result::Result<String, Skip> {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map_err(|_| Skip::new("caption is not UTF-8", path.display().to_string())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Skip::new("no caption", format!("no {}", path.display())))
        }
        Err(e) => Err(Skip::new("unreadable caption", e.to_string())),
    }
}

impl Source for Folder {
    fn describe(&self) -> serde_json::Value {
        json!({
            "folder": self.root,
            "captions": self.captions,
            "extension": self.extension,
            "content": listing(&self.files),
        })
    }

    fn has_pictures(&self) -> bool {
        true
    }

    fn units(&self) -> usize {
        self.files.len().div_ceil(UNIT)
    }

    fn read_unit(&self, unit: usize, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
        for file in &self.files[self.range(unit)] {
            let text = caption_file(file, self.captions.as_deref(), &self.extension);
            let content = read_caption(&text).map(|caption| Content {
                caption,
                picture: Some(Payload::File(file.clone())),
            });
            let id = file.strip_prefix(&self.root).unwrap_or(file);
            sink(Record {
                id: id.display().to_string(),
                content,
            })?;
        }
        Ok(())
    }
}
