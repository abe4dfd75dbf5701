//! Rows of parquet files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};
use ::parquet::schema::types::{Type, TypePtr};
use serde_json::json;

use super::{Content, Payload, Record, Skip, Source, files_below, listing};
use crate::{DataError, Result};

/// Where the pictures of parquet rows are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParquetPictures {
    /// There are none: a set of prompts.
    None,
    /// In a column of bytes, or of `{bytes, path}` as Hugging Face's datasets have it.
    Column(String),
    /// DiffusionDB: files `part-PPPPPP/NAME` by the columns `part_id` and `image_name`.
    DiffusionDb(PathBuf),
}

/// Rows of parquet files: a caption column, and pictures or none.
#[derive(Debug)]
pub struct ParquetRows {
    root: PathBuf,
    caption: String,
    pictures: ParquetPictures,
    files: Vec<PathBuf>,
    /// File and row group of each unit.
    groups: Vec<(usize, usize)>,
}

impl ParquetRows {
    /// All `*.parquet` below `root`, or the one file `root`.
    ///
    /// # Errors
    /// No parquet files, unreadable ones, or files without the columns.
    pub fn open(root: &Path, caption: &str, pictures: ParquetPictures) -> Result<Self> {
        let is_parquet = |path: &Path| path.extension().is_some_and(|e| e == "parquet");
        let files = files_below(root, is_parquet)?;
        if files.is_empty() {
            return Err(DataError::Source {
                path: root.to_owned(),
                reason: "holds no .parquet files".to_owned(),
            });
        }
        let mut this = Self {
            root: root.to_owned(),
            caption: caption.to_owned(),
            pictures,
            files,
            groups: Vec::new(),
        };
        for (number, file) in this.files.iter().enumerate() {
            let reader = open(file)?;
            project(file, &reader, &this.columns())?;
            let groups = reader.num_row_groups();
            this.groups.extend((0..groups).map(|group| (number, group)));
        }
        Ok(this)
    }

    fn columns(&self) -> Vec<&str> {
        let mut columns = vec![self.caption.as_str()];
        match &self.pictures {
            ParquetPictures::None => {}
            ParquetPictures::Column(name) => columns.push(name),
            ParquetPictures::DiffusionDb(_) => columns.extend(["part_id", "image_name"]),
        }
        columns
    }

    fn content(&self, row: &Row) -> std::result::Result<Content, Skip> {
        let caption = match field(row, &self.caption) {
            Some(Field::Str(text)) => text.clone(),
            Some(Field::Bytes(bytes)) => String::from_utf8(bytes.data().to_vec())
                .map_err(|_| Skip::new("caption is not UTF-8", ""))?,
            Some(Field::Null) | None => return Err(Skip::new("no caption", "")),
            Some(_) => return Err(Skip::new("caption is no text", "")),
        };
        let picture = match &self.pictures {
            ParquetPictures::None => None,
            ParquetPictures::Column(name) => Some(Payload::Bytes(picture(field(row, name))?)),
            ParquetPictures::DiffusionDb(folder) => {
                let name = match field(row, "image_name") {
                    Some(Field::Str(name)) if !name.contains(['/', '\\']) => name,
                    _ => return Err(Skip::new("no picture", "no image_name")),
                };
                let part = field(row, "part_id").and_then(integer);
                let part = part.ok_or_else(|| Skip::new("no picture", "no part_id"))?;
                Some(Payload::File(
                    folder.join(format!("part-{part:06}")).join(name),
                ))
            }
        };
        Ok(Content { caption, picture })
    }
}

fn field<'a>(row: &'a Row, name: &str) -> Option<&'a Field> {
    row.get_column_iter()
        .find(|(column, _)| *column == name)
        .map(|(_, field)| field)
}

fn integer(field: &Field) -> Option<i64> {
    Some(match field {
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => *n,
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => i64::try_from(*n).ok()?,
        _ => return None,
    })
}

/// A picture's bytes: the field itself, or its part `bytes`.
fn picture(found: Option<&Field>) -> std::result::Result<Vec<u8>, Skip> {
    match found {
        Some(Field::Bytes(bytes)) => Ok(bytes.data().to_vec()),
        Some(Field::Group(parts)) => match field(parts, "bytes") {
            Some(Field::Bytes(bytes)) => Ok(bytes.data().to_vec()),
            _ => Err(Skip::new("no picture", "the column has no bytes here")),
        },
        Some(Field::Null) | None => Err(Skip::new("no picture", "the column is null here")),
        Some(_) => Err(Skip::new("no picture", "the column holds no bytes")),
    }
}

fn wrong(path: &Path, reason: impl ToString) -> DataError {
    DataError::Source {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    SerializedFileReader::new(file).map_err(|e| wrong(path, e))
}

/// The file's schema with these columns only.
fn project(path: &Path, reader: &dyn FileReader, columns: &[&str]) -> Result<Type> {
    let schema = reader.metadata().file_metadata().schema();
    let found = |name: &&str| -> Result<TypePtr> {
        let fields = schema.get_fields();
        let field = fields.iter().find(|field| field.name() == *name);
        field.map(Arc::clone).ok_or_else(|| {
            let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
            wrong(
                path,
                format!("no column {name:?}; it has {}", names.join(", ")),
            )
        })
    };
    let fields = columns.iter().map(found).collect::<Result<Vec<_>>>()?;
    Type::group_type_builder(schema.name())
        .with_fields(fields)
        .build()
        .map_err(|e| wrong(path, e))
}

impl Source for ParquetRows {
    fn describe(&self) -> serde_json::Value {
        json!({
            "parquet": self.root,
            "caption": self.caption,
            "pictures": format!("{:?}", self.pictures),
            "content": listing(&self.files),
        })
    }

    fn has_pictures(&self) -> bool {
        self.pictures != ParquetPictures::None
    }

    fn units(&self) -> usize {
        self.groups.len()
    }

    fn read_unit(&self, unit: usize, sink: &mut dyn FnMut(Record) -> Result<()>) -> Result<()> {
        let (file, group) = self.groups[unit];
        let path = &self.files[file];
        let failed = |e: ParquetError| wrong(path, e);
        let reader = open(path)?;
        let projection = project(path, &reader, &self.columns())?;
        let group_reader = reader.get_row_group(group).map_err(failed)?;
        let rows = group_reader
            .get_row_iter(Some(projection))
            .map_err(failed)?;
        let name = path
            .strip_prefix(&self.root)
            .ok()
            .filter(|p| p.as_os_str() != "");
        let name = name.unwrap_or(path).display();
        for (number, row) in rows.enumerate() {
            let record = match row {
                Ok(row) => self.content(&row),
                // What stands behind the damage cannot be counted; that there is some is.
                Err(e) => Err(Skip::new("damaged row group, rest not read", e.to_string())),
            };
            let broken = record
                .as_ref()
                .is_err_and(|skip| skip.reason.starts_with("damaged"));
            sink(Record {
                id: format!("{name}, row group {group}, row {number}"),
                content: record,
            })?;
            if broken {
                break;
            }
        }
        Ok(())
    }
}

/// A column of text of all parquet files below `root`, in order; nulls are empty.
pub fn text_column(root: &Path, column: &str) -> Result<Vec<String>> {
    let rows = ParquetRows::open(root, column, ParquetPictures::None)?;
    let mut texts = Vec::new();
    for unit in 0..rows.units() {
        rows.read_unit(unit, &mut |record| {
            match record.content {
                Ok(content) => texts.push(content.caption),
                Err(skip) if skip.reason == "no caption" => texts.push(String::new()),
                Err(skip) => return Err(wrong(root, format!("{}: {}", record.id, skip.detail))),
            }
            Ok(())
        })?;
    }
    Ok(texts)
}
