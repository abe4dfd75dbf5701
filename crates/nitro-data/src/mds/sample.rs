//! Columns and the samples made of them.

use std::ops::Range;
use std::sync::Arc;

use ::image::RgbImage;
use half::f16;

use super::{Encoding, Value};
use crate::{DataError, Result};

/// A column: its name and how its values are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// How values are stored.
    pub encoding: Encoding,
    /// Bytes of every value, where fixed.
    pub size: Option<usize>,
}

/// The columns of a dataset, in the order in which they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    columns: Vec<Column>,
}

impl Schema {
    /// Columns by name and encoding, in any order: MDS stores them sorted by name.
    ///
    /// # Errors
    /// An unknown encoding, a name given twice, no column.
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut columns: Vec<_> = columns.into_iter().collect();
        columns.sort();
        Self::in_order(columns)
    }

    pub(super) fn in_order<'a>(
        columns: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        let column = |(name, encoding): (&str, &str)| -> Result<Column> {
            let encoding: Encoding = encoding.parse()?;
            Ok(Column {
                name: name.to_owned(),
                size: encoding.fixed_size(),
                encoding,
            })
        };
        let columns: Vec<Column> = columns.into_iter().map(column).collect::<Result<_>>()?;
        if columns.is_empty() {
            return Err(DataError::column("", "a dataset needs at least one column"));
        }
        for (i, column) in columns.iter().enumerate() {
            if columns[..i].iter().any(|other| other.name == column.name) {
                return Err(DataError::column(&column.name, "is there twice"));
            }
        }
        Ok(Self { columns })
    }

    /// The columns.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Position of the column of this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// Names and encodings, as [`Schema::new`] takes them.
    pub fn pairs(&self) -> Vec<(String, String)> {
        let pair = |c: &Column| (c.name.clone(), c.encoding.to_string());
        self.columns.iter().map(pair).collect()
    }

    /// The bytes of a sample of these values, which may come in any order.
    ///
    /// # Errors
    /// A missing or surplus column, or a value that its column cannot store.
    pub fn encode(&self, values: &[(&str, Value)]) -> Result<Vec<u8>> {
        if let Some((name, _)) = values
            .iter()
            .find(|(name, _)| self.position(name).is_none())
        {
            return Err(DataError::column(name, "the dataset has no such column"));
        }
        let (mut head, mut body) = (Vec::new(), Vec::new());
        for column in &self.columns {
            let mut found = values.iter().filter(|(name, _)| *name == column.name);
            let (Some((_, value)), None) = (found.next(), found.next()) else {
                return Err(DataError::column(
                    &column.name,
                    "expected one value in the sample",
                ));
            };
            let bytes = column.encoding.encode(value);
            let bytes = bytes.map_err(|reason| DataError::column(&column.name, reason))?;
            if column.size.is_none() {
                let size = u32::try_from(bytes.len())
                    .map_err(|_| DataError::column(&column.name, "a value of 4 GiB or more"))?;
                head.extend(size.to_le_bytes());
            }
            body.extend(bytes);
        }
        head.extend(body);
        Ok(head)
    }

    /// Where each column's bytes are in a sample.
    ///
    /// # Errors
    /// Sizes that do not add up to the sample's; the message says which.
    pub fn split(&self, bytes: &[u8]) -> std::result::Result<Vec<Range<usize>>, String> {
        let variable = self.columns.iter().filter(|column| column.size.is_none());
        let mut at = 4 * variable.count();
        let mut sizes = bytes
            .get(..at)
            .ok_or("shorter than its table of sizes")?
            .chunks_exact(4);
        let mut ranges = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            let size = column.size.unwrap_or_else(|| {
                let mut word = [0; 4];
                word.copy_from_slice(sizes.next().unwrap_or(&[0; 4]));
                u32::from_le_bytes(word) as usize
            });
            ranges.push(at..at + size);
            at += size;
        }
        match at == bytes.len() {
            true => Ok(ranges),
            false => Err(format!(
                "its columns have {at} bytes together, the sample has {}",
                bytes.len()
            )),
        }
    }
}

/// A sample: the bytes of its columns, decoded on demand.
#[derive(Debug, Clone)]
pub struct Sample {
    schema: Arc<Schema>,
    bytes: Vec<u8>,
    ranges: Vec<Range<usize>>,
}

impl Sample {
    /// Takes a sample's bytes apart.
    pub(super) fn new(schema: Arc<Schema>, bytes: Vec<u8>) -> std::result::Result<Self, String> {
        let ranges = schema.split(&bytes)?;
        Ok(Self {
            schema,
            bytes,
            ranges,
        })
    }

    /// The columns.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Whether the sample has this column.
    pub fn has(&self, name: &str) -> bool {
        self.schema.position(name).is_some()
    }

    fn column(&self, name: &str) -> Result<(&Column, &[u8])> {
        let position = self.schema.position(name).ok_or_else(|| {
            let names: Vec<&str> = self
                .schema
                .columns
                .iter()
                .map(|c| c.name.as_str())
                .collect();
            DataError::column(name, format!("the dataset has {}", names.join(", ")))
        })?;
        let column = &self.schema.columns[position];
        Ok((column, &self.bytes[self.ranges[position].clone()]))
    }

    /// The bytes of a column as they are stored.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.column(name).map(|(_, bytes)| bytes)
    }

    /// A column's value.
    pub fn value(&self, name: &str) -> Result<Value> {
        let (column, bytes) = self.column(name)?;
        let value = column.encoding.decode(bytes);
        value.map_err(|reason| DataError::column(name, reason))
    }

    /// A column of text.
    pub fn text(&self, name: &str) -> Result<&str> {
        let bytes = self.bytes(name)?;
        std::str::from_utf8(bytes).map_err(|_| DataError::column(name, "not UTF-8"))
    }

    /// A picture, as RGB.
    pub fn picture(&self, name: &str) -> Result<RgbImage> {
        let picture = match self.value(name)? {
            Value::Pixels(pixels) => crate::image::from_pixels(pixels),
            Value::Image(bytes) | Value::Bytes(bytes) => crate::image::decode(&bytes),
            _ => Err("no picture".to_owned()),
        };
        picture.map_err(|reason| DataError::column(name, reason))
    }

    /// A column of raw `f16` values (the official pipeline's `latents_512`, `text_feat`,
    /// `dino_feat`), widened.
    pub fn f16s(&self, name: &str) -> Result<Vec<f32>> {
        let words = self.words::<2>(name, "float16")?;
        Ok(words
            .map(|word| f16::from_le_bytes(word).to_f32())
            .collect())
    }

    /// A column of raw `i64` values (the official pipeline's `text_mask`).
    pub fn i64s(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self
            .words::<8>(name, "int64")?
            .map(i64::from_le_bytes)
            .collect())
    }

    fn words<const N: usize>(
        &self,
        name: &str,
        of: &str,
    ) -> Result<impl Iterator<Item = [u8; N]> + '_> {
        let (words, rest) = self.bytes(name)?.as_chunks::<N>();
        match rest.is_empty() {
            true => Ok(words.iter().copied()),
            false => Err(DataError::column(
                name,
                format!("its bytes are no whole {of} values"),
            )),
        }
    }
}
