use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde_json::json;

use super::folder::{caption_file, read_caption};
use super::{Content, Payload, Record, Skip, Source, files_below, is_picture, listing};
use crate::{DataError, Result};

/// Tar files in which neighbouring entries of one name belong together: WebDataset, or SA-1B with
/// its captions in a folder.
#[derive(Debug)]
pub struct Tars {
    root: PathBuf,
    captions: Option<PathBuf>,
    /// Entry or JSON field with the caption.
    field: String,
    files: Vec<PathBuf>,
}

/// How gzip files begin.
const GZIP: [u8; 2] = [0x1f, 0x8b];

impl Tars {
    /// All `*.tar`, `*.tar.gz` and `*.tgz` below `root`, or the one tar `root`. Captions come from the folder `captions` if
    /// given (`NAME.txt`), else from the sample's `.txt`, else from the field `field` of its `.json`.
    pub fn open(root: &Path, captions: Option<&Path>, field: &str) -> Result<Self> {
        let is_tar = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.to_ascii_lowercase();
            [".tar", ".tar.gz", ".tgz"]
                .iter()
                .any(|ending| name.ends_with(ending))
        };
        let files = files_below(root, is_tar)?;
        if files.is_empty() {
            return Err(DataError::Source {
                path: root.to_owned(),
                reason: "holds no .tar, .tar.gz or .tgz files".to_owned(),
            });
        }
        Ok(Self {
            root: root.to_owned(),
            captions: captions.map(Path::to_owned),
            field: field.to_owned(),
            files,
        })
    }

    fn record(&self, tar: &Path, group: Group) -> Option<Record> {
        let (name, picture) = group.picture?;
        let caption = match (&self.captions, group.text, group.json) {
            (Some(folder), ..) => {
                read_caption(&caption_file(Path::new(&name), Some(folder), "txt"))
            }
            (None, Some(text), _) => {
                String::from_utf8(text).map_err(|_| Skip::new("caption is not UTF-8", ""))
            }
            (None, None, Some(json)) => match serde_json::from_slice(&json) {
                Ok(serde_json::Value::Object(fields)) => match fields.get(&self.field) {
                    Some(serde_json::Value::String(caption)) => Ok(caption.clone()),
                    _ => Err(Skip::new(
                        "no caption",
                        format!("no text {:?} in its json", self.field),
                    )),
                },
                _ => Err(Skip::new("caption json is no object", "")),
            },
            (None, None, None) => Err(Skip::new("no caption", "neither .txt nor .json")),
        };
        let tar = tar.strip_prefix(&self.root).unwrap_or(tar);
        Some(Record {
            id: format!("{}:{name}", tar.display()),
            content: caption.map(|caption| Content {
                caption,
                picture: Some(Payload::Bytes(picture)),
            }),
        })
    }

    fn read(&self, tar: &Path, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<Broken> {
        let file = File::open(tar).map_err(DataError::io("open", tar))?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        // By what it is, not by its name: a file's first bytes are gzip's, or an entry's path.
        let begin = file.fill_buf().map_err(DataError::io("read", tar))?;
        let input: Box<dyn Read> = match begin.starts_with(&GZIP) {
            true => Box::new(MultiGzDecoder::new(file)),
            false => Box::new(file),
        };
        let mut archive = tar::Archive::new(input);
        let entries = match archive.entries() {
            Ok(entries) => entries,
            Err(e) => return Ok(Some(e.to_string())),
        };
        let mut group = Group::default();
        for entry in entries {
            let (name, kind, bytes) = match entry.and_then(|mut entry| {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                let kind = Kind::of(&name, entry.header().entry_type().is_file());
                let mut bytes = Vec::new();
                if kind != Kind::Other {
                    entry.read_to_end(&mut bytes)?;
                    if bytes.len() as u64 != entry.size() {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Ok((name, kind, bytes))
            }) {
                Ok(parts) => parts,
                Err(e) => {
                    if let Some(record) = self.record(tar, group) {
                        sink(record)?;
                    }
                    return Ok(Some(e.to_string()));
                }
            };
            let key = key(&name);
            if key != group.key {
                let old = std::mem::replace(&mut group, Group::of(key));
                if let Some(record) = self.record(tar, old) {
                    sink(record)?;
                }
            }
            match kind {
                Kind::Picture => group.picture = Some((name, bytes)),
                Kind::Text => group.text = Some(bytes),
                Kind::Json => group.json = Some(bytes),
                Kind::Other => {}
            }
        }
        if let Some(record) = self.record(tar, group) {
            sink(record)?;
        }
        Ok(None)
    }
}

/// Why a tar could not be read to its end.
type Broken = Option<String>;

/// WebDataset's key: the path up to the first dot of the file name.
fn key(name: &str) -> String {
    let name = name.trim_start_matches("./");
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    let end = name[file..].find('.').map_or(name.len(), |dot| file + dot);
    name[..end].to_owned()
}

#[derive(PartialEq)]
enum Kind {
    Picture,
    Text,
    Json,
    Other,
}

impl Kind {
    fn of(name: &str, is_file: bool) -> Self {
        let path = Path::new(name);
        match path.extension().and_then(|e| e.to_str()) {
            _ if !is_file => Kind::Other,
            _ if is_picture(path) => Kind::Picture,
            Some("txt") => Kind::Text,
            Some("json") => Kind::Json,
            _ => Kind::Other,
        }
    }
}

/// Entries of one key.
#[derive(Default)]
struct Group {
    key: String,
    picture: Option<(String, Vec<u8>)>,
    text: Option<Vec<u8>>,
    json: Option<Vec<u8>>,
}

impl Group {
    fn of(key: String) -> Self {
        Self {
            key,
            ..Self::default()
        }
    }
}

impl Source for Tars {
    fn describe(&self) -> serde_json::Value {
        json!({
            "tars": self.root,
            "captions": self.captions,
            "field": self.field,
            "content": listing(&self.files),
        })
    }

    fn has_pictures(&self) -> bool {
        true
    }

    fn units(&self) -> usize {
        self.files.len()
    }

    fn read_unit(&self, unit: usize, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
        let tar = &self.files[unit];
        match self.read(tar, sink)? {
            None => Ok(()),
            // What stands behind the damage cannot be counted; that there is some is.
            Some(detail) => sink(Record {
                id: tar.display().to_string(),
                content: Err(Skip::new("damaged tar, rest not read", detail)),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_name() {
        assert_eq!(key("./a.b/0001.seg.png"), "a.b/0001");
        assert_eq!(key("0001.jpg"), "0001");
        assert_eq!(key("dir/none"), "dir/none");
    }
}
