//! TensorBoard's event files: records framed as in TFRecord, each a protocol buffer `Event`.
//!
//! A record is its length (`u64`), the masked CRC-32C of that, the bytes, and their masked CRC-32C,
//! all little-endian. Of `Event` and `Summary` (tensorflow/core/util/event.proto and
//! core/framework/summary.proto) only the fields used here are written.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::TrainError;

/// An event file being written.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// A new file in `dir` for a run that goes on from `step`. TensorBoard drops what earlier files
    /// hold from there on, which a killed process may have written.
    pub fn create(dir: &Path, step: u64) -> Result<Self, TrainError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| TrainError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let process = std::process::id();
        // The time first, so that file names sort as TensorBoard reads them.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{process}.nitro",
            now.as_secs(),
            now.subsec_nanos()
        );
        let path = dir.join(name);
        let file = File::create_new(&path).map_err(io(&path))?;
        let mut this = Self {
            path,
            file: BufWriter::new(file),
        };
        let version = Message::default().bytes(3, b"brain.Event:2");
        this.event(0, version)?;
        let start = Message::default().varint(1, 1); // SessionLog.status = START
        this.event(step, Message::default().message(7, start))?;
        Ok(this)
    }

    /// Writes numbers at `step`.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<(), TrainError> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let value = Message::default()
                .bytes(1, tag.as_bytes())
                .float(2, value as f32);
            summary = summary.message(1, value);
        }
        self.event(step, Message::default().message(5, summary))
    }

    /// Writes a PNG picture at `step`.
    pub fn picture(
        &mut self,
        step: u64,
        tag: &str,
        (width, height): (u32, u32),
        png: &[u8],
    ) -> Result<(), TrainError> {
        let picture = Message::default()
            .varint(1, u64::from(height))
            .varint(2, u64::from(width))
            .varint(3, 3) // RGB
            .bytes(4, png);
        let value = Message::default()
            .bytes(1, tag.as_bytes())
            .message(4, picture);
        let summary = Message::default().message(1, value);
        self.event(step, Message::default().message(5, summary))
    }

    fn event(&mut self, step: u64, what: Message) -> Result<(), TrainError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut event = Message::default()
            .double(1, now.unwrap_or_default().as_secs_f64())
            .varint(2, step);
        event.0.extend(what.0);
        write_record(&mut self.file, &event.0)
            .and_then(|()| self.file.flush())
            .map_err(|source| TrainError::Io {
                path: self.path.clone(),
                source,
            })
    }
}

fn write_record(to: &mut impl Write, data: &[u8]) -> io::Result<()> {
    let length = (data.len() as u64).to_le_bytes();
    to.write_all(&length)?;
    to.write_all(&masked_crc(&length).to_le_bytes())?;
    to.write_all(data)?;
    to.write_all(&masked_crc(data).to_le_bytes())
}

/// TFRecord's checksum: CRC-32C, rotated and shifted so that a checksum of checksums is no trap.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// A protocol buffer message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn varint(self, field: u64, value: u64) -> Self {
        self.raw(field << 3).raw(value)
    }

    fn double(self, field: u64, value: f64) -> Self {
        let mut this = self.raw(field << 3 | 1);
        this.0.extend(value.to_le_bytes());
        this
    }

    fn float(self, field: u64, value: f32) -> Self {
        let mut this = self.raw(field << 3 | 5);
        this.0.extend(value.to_le_bytes());
        this
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        let mut this = self.raw(field << 3 | 2).raw(value.len() as u64);
        this.0.extend(value);
        this
    }

    fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, &value.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of a message: number, and its bytes (of a varint, the value's).
    fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(data: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        }
        let mut all = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let length = match key & 7 {
                0 => {
                    let value = varint(&mut data);
                    all.push((key >> 3, value.to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut data) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, data[..length].to_vec()));
            data = &data[length..];
        }
        all
    }

    /// The events of a file, their checksums verified.
    fn events(path: &Path) -> Vec<Vec<(u64, Vec<u8>)>> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut all = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked_crc(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(crc(12 + length), masked_crc(data));
            all.push(fields(data));
            rest = &rest[16 + length..];
        }
        all
    }

    fn field(fields: &[(u64, Vec<u8>)], number: u64) -> &[u8] {
        &fields.iter().find(|(n, _)| *n == number).unwrap().1
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 300).unwrap();
        let values = [("loss", 0.25), ("lr", 1e-3)];
        writer.scalars(301, values).unwrap();
        writer.picture(302, "samples", (4, 2), b"png").unwrap();

        let events = events(&writer.path);
        assert_eq!(events.len(), 4);
        assert_eq!(field(&events[0], 3), b"brain.Event:2");
        assert_eq!(field(&events[1], 2), 300u64.to_le_bytes());
        assert_eq!(
            fields(field(&events[1], 7)),
            [(1, 1u64.to_le_bytes().to_vec())]
        );
        assert_eq!(field(&events[2], 2), 301u64.to_le_bytes());
        let summary = fields(field(&events[2], 5));
        assert_eq!(summary.len(), 2);
        let loss = fields(&summary[0].1);
        assert_eq!(field(&loss, 1), b"loss");
        assert_eq!(field(&loss, 2), 0.25f32.to_le_bytes());
        let picture = fields(&fields(field(&events[3], 5))[0].1);
        let picture = fields(field(&picture, 4));
        assert_eq!(field(&picture, 2), 4u64.to_le_bytes(), "width");
        assert_eq!(field(&picture, 4), b"png");
    }

    #[test]
    fn the_checksum_is_tensorflows() {
        // The length field of a 24-byte record, from a file written by TensorFlow.
        let length = 24u64.to_le_bytes();
        assert_eq!(masked_crc(&length).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
    }
}
