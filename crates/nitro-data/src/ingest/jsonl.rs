use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde_json::json;

use super::{Content, Payload, Record, Skip, Source};
use crate::{DataError, Result};

/// JourneyDB: a JSON object per line with `prompt` and `img_path`, and the pictures in folders.
#[derive(Debug)]
pub struct JourneyDb {
    annotations: PathBuf,
    images: PathBuf,
    field: String,
    bytes: u64,
}

/// Bytes of annotations in a unit; a line belongs to the unit in which it begins.
const UNIT: u64 = 4 << 20;

impl JourneyDb {
    /// Lines of `annotations`, with captions in `field` (`prompt`) and pictures below `images`.
    pub fn open(annotations: &Path, images: &Path, field: &str) -> Result<Self> {
        let about = std::fs::metadata(annotations).map_err(DataError::io("read", annotations))?;
        if !images.is_dir() {
            return Err(DataError::Source {
                path: images.to_owned(),
                reason: "there is no such folder of pictures".to_owned(),
            });
        }
        Ok(Self {
            annotations: annotations.to_owned(),
            images: images.to_owned(),
            field: field.to_owned(),
            bytes: about.len(),
        })
    }

    fn content(&self, line: &[u8]) -> std::result::Result<Content, Skip> {
        let json: serde_json::Value = serde_json::from_slice(line)
            .map_err(|e| Skip::new("annotation is not JSON", e.to_string()))?;
        let text = |field: &str| {
            let missing = || Skip::new("annotation lacks a field", format!("no text {field:?}"));
            json[field].as_str().ok_or_else(missing)
        };
        let path = text("img_path")?;
        let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !Path::new(path).components().all(inside) {
            return Err(Skip::new("picture outside of the folder", path));
        }
        Ok(Content {
            caption: text(&self.field)?.to_owned(),
            picture: Some(Payload::File(self.images.join(path))),
        })
    }
}

impl Source for JourneyDb {
    fn describe(&self) -> serde_json::Value {
        json!({
            "journeydb": self.annotations,
            "images": self.images,
            "field": self.field,
            "bytes": self.bytes,
        })
    }

    fn has_pictures(&self) -> bool {
        true
    }

    fn units(&self) -> usize {
        self.bytes.div_ceil(UNIT) as usize
    }

    fn read_unit(&self, unit: usize, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
        let failed = |e| DataError::io("read", &self.annotations)(e);
        let file = File::open(&self.annotations).map_err(failed)?;
        let mut reader = BufReader::new(file);
        let (mut at, end) = (unit as u64 * UNIT, (unit as u64 + 1) * UNIT);
        let mut line = Vec::new();
        if at > 0 {
            // The line that is under way at the border belongs to the unit before.
            reader.seek(SeekFrom::Start(at - 1)).map_err(failed)?;
            at = at - 1 + reader.read_until(b'\n', &mut line).map_err(failed)? as u64;
        }
        while at < end {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(failed)?;
            if read == 0 {
                break;
            }
            if !line.trim_ascii().is_empty() {
                sink(Record {
                    id: format!("{}@{at}", self.annotations.display()),
                    content: self.content(&line),
                })?;
            }
            at += read as u64;
        }
        Ok(())
    }
}
