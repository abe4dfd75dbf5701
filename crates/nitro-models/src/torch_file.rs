//! Checkpoints as `torch.save` writes them: a zip archive of raw storages, and a pickle that says which
//! tensor lies where. Many official weights come in no other form (`HPS_v2.1_compressed.pt`,
//! `ImageReward.pt`).
//!
//! The pickle is read as data: nothing in it is run, and what is no tensor is passed over.

mod pickle;

use std::collections::HashMap;
use std::ops::Range;

use safetensors::Dtype;

use pickle::{Tensor, Value};

/// What a zip archive begins with.
const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const CENTRAL_HEADER: u32 = 0x0201_4b50;
const END: &[u8] = b"PK\x05\x06";
const END_64_LOCATOR: &[u8] = b"PK\x06\x07";
/// Where the names of a checkpoint lie when they are not its own top level.
const NESTED: [&str; 2] = ["state_dict", "model"];

/// Where a tensor lies in the file.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Elements from one index to the next of each dimension, where that is not row-major order.
    pub(crate) strides: Option<Vec<usize>>,
    /// Bytes of the file.
    pub(crate) range: Range<usize>,
}

/// Whether these bytes are a zip archive.
pub(crate) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL_HEADER)
}

/// Whether these bytes are a bare pickle, as `torch.save` wrote before PyTorch 1.6.
pub(crate) fn is_old_torch(bytes: &[u8]) -> bool {
    // Protocol 2, and the magic number as a long of ten bytes.
    bytes.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")
}

/// The tensors of a checkpoint's state dict.
pub(crate) fn locate(bytes: &[u8]) -> Result<Vec<Located>, String> {
    let entries = entries(bytes)?;
    let (pickle, prefix) = entries
        .iter()
        .find_map(|(name, range)| Some((range.clone(), name.strip_suffix("data.pkl")?)))
        .ok_or("this archive holds no data.pkl: torch.save did not write it")?;
    let root = pickle::read(&bytes[pickle])?;
    let mut found = Vec::new();
    for (name, tensor) in state_dict(&root)? {
        let storage = format!("{prefix}data/{}", tensor.storage.key);
        let data = entries.get(&storage).ok_or_else(|| {
            format!("`{name}` lies in {storage}, which the archive does not hold")
        })?;
        found.push(place(name, tensor, data.clone()).ok_or_else(|| {
            format!(
                "`{name}` reaches beyond the {} bytes of {storage}",
                data.len()
            )
        })?);
    }
    Ok(found)
}

/// The tensor's place in the file, if its storage is large enough.
fn place(name: &str, tensor: &Tensor, data: Range<usize>) -> Option<Located> {
    let size = tensor.storage.dtype.bitsize() / 8;
    let count = tensor
        .shape
        .iter()
        .try_fold(1usize, |product, n| product.checked_mul(*n))?;
    let mut row_major = vec![1usize; tensor.shape.len()];
    for i in (1..tensor.shape.len()).rev() {
        row_major[i - 1] = row_major[i].checked_mul(tensor.shape[i].max(1))?;
    }
    // A stride is of no consequence where there is one index.
    let in_order = std::iter::zip(&tensor.shape, std::iter::zip(&tensor.strides, &row_major))
        .all(|(n, (a, b))| *n <= 1 || a == b);
    let strides = (!in_order && count > 0).then(|| tensor.strides.clone());
    let reach = match &strides {
        None => count,
        Some(strides) => std::iter::zip(&tensor.shape, strides)
            .try_fold(1usize, |reach, (n, s)| {
                reach.checked_add((n - 1).checked_mul(*s)?)
            })?,
    };
    let start = data.start.checked_add(tensor.offset.checked_mul(size)?)?;
    let end = start.checked_add(reach.checked_mul(size)?)?;
    (end <= data.end).then(|| Located {
        name: name.to_owned(),
        dtype: tensor.storage.dtype,
        shape: tensor.shape.clone(),
        strides,
        range: start..end,
    })
}

/// Elements in row-major order out of a storage with strides.
pub(crate) fn in_order<T: Copy>(stored: &[T], shape: &[usize], strides: &[usize]) -> Vec<T> {
    let count = shape.iter().product();
    let element = |mut index: usize| {
        let mut at = 0;
        for (n, stride) in std::iter::zip(shape, strides).rev() {
            at += index % n * stride;
            index /= n;
        }
        stored[at]
    };
    (0..count).map(element).collect()
}

/// The named tensors of a dictionary.
fn tensors(dict: &Value) -> Vec<(&str, &Tensor)> {
    let Value::Dict(pairs) = dict else {
        return Vec::new();
    };
    let named = pairs.iter().filter_map(|(key, value)| match (key, value) {
        (Value::Text(name), Value::Tensor(tensor)) => Some((name.as_ref(), tensor.as_ref())),
        _ => None,
    });
    named.collect()
}

/// The named tensors at the top level, or one level down.
fn state_dict(root: &Value) -> Result<Vec<(&str, &Tensor)>, String> {
    let Value::Dict(pairs) = root else {
        return Err("the checkpoint is no dictionary of tensors".to_owned());
    };
    for wanted in NESTED {
        let inner = pairs
            .iter()
            .find(|(key, _)| matches!(key, Value::Text(name) if name.as_ref() == wanted));
        if let Some((_, inner)) = inner {
            let found = tensors(inner);
            if !found.is_empty() {
                return Ok(found);
            }
        }
    }
    match tensors(root) {
        found if found.is_empty() => Err(
            "the checkpoint holds no tensors, neither at its top level nor in `state_dict` or `model`"
                .to_owned(),
        ),
        found => Ok(found),
    }
}

/// The files of an archive and where their bytes lie.
fn entries(bytes: &[u8]) -> Result<HashMap<String, Range<usize>>, String> {
    let cut = || "the archive ends early".to_owned();
    // The end record is followed by a comment of at most 64 KiB.
    let tail = bytes.len().saturating_sub(66 * 1024);
    let end = bytes[tail..]
        .windows(END.len())
        .rposition(|window| window == END)
        .map(|at| tail + at)
        .ok_or_else(cut)?;
    number(bytes, end + 20, 2).ok_or_else(cut)?; // the record's last field
    let mut count = number(bytes, end + 10, 2).ok_or_else(cut)?;
    let mut at = number(bytes, end + 16, 4).ok_or_else(cut)?;
    // Archives beyond 4 GiB or 65535 files have a second, larger end record.
    if let Some(locator) = end.checked_sub(20)
        && bytes[locator..].starts_with(END_64_LOCATOR)
    {
        let record = number(bytes, locator + 8, 8).ok_or_else(cut)?;
        let field = |offset: usize| number(bytes, record.checked_add(offset)?, 8);
        count = field(32).ok_or_else(cut)?;
        at = field(48).ok_or_else(cut)?;
    }
    let mut found = HashMap::new();
    for _ in 0..count {
        let field = |offset: usize, size: usize| number(bytes, at.checked_add(offset)?, size);
        let entry = (|| {
            Some((
                field(0, 4)? as u32 == CENTRAL_HEADER,
                field(10, 2)?,
                [field(24, 4)?, field(42, 4)?],
                [field(28, 2)?, field(30, 2)?, field(32, 2)?],
            ))
        })();
        let (known, method, [mut size, mut header], lengths) = entry.ok_or_else(cut)?;
        if !known {
            return Err("the archive's directory is damaged".to_owned());
        }
        let [name_len, extra_len, comment_len] = lengths;
        let name = bytes.get(at + 46..at + 46 + name_len).ok_or_else(cut)?;
        let name = String::from_utf8_lossy(name).into_owned();
        let extra = at + 46 + name_len;
        let extra_end = extra + extra_len;
        wide_fields(bytes, extra..extra_end, &mut size, &mut header).ok_or_else(cut)?;
        if method != 0 && (name.ends_with("data.pkl") || name.contains("/data/")) {
            return Err(format!("{name} is compressed, which torch.save never does"));
        }
        // The local header repeats name and extra fields, the latter in another length.
        let local = |offset: usize| number(bytes, header.checked_add(offset)?, 2);
        let start = local(26)
            .zip(local(28))
            .map(|(name, extra)| header + 30 + name + extra)
            .ok_or_else(cut)?;
        let range = start..start.checked_add(size).ok_or_else(cut)?;
        if method == 0 {
            bytes.get(range.clone()).ok_or_else(cut)?;
            found.insert(name, range);
        }
        at = extra_end + comment_len;
    }
    Ok(found)
}

/// Replaces fields that are full by those of the 64-bit extension among the extra fields.
fn wide_fields(
    bytes: &[u8],
    extra: Range<usize>,
    size: &mut usize,
    header: &mut usize,
) -> Option<()> {
    const FULL: usize = 0xffff_ffff;
    const EXTENSION: usize = 1;
    let mut at = extra.start;
    while at + 4 <= extra.end {
        let (id, len) = (number(bytes, at, 2)?, number(bytes, at + 2, 2)?);
        if id == EXTENSION {
            let mut field = at + 4;
            // Uncompressed size, compressed size (the same here), offset: each only if it is needed.
            if *size == FULL {
                *size = number(bytes, field, 8)?;
                field += 16;
            }
            if *header == FULL {
                *header = number(bytes, field, 8)?;
            }
        }
        at += 4 + len;
    }
    Some(())
}

/// A little-endian number of `size` bytes.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(size)?)?;
    let value = field
        .iter()
        .rev()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    usize::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_followed() {
        // The transpose of [[0, 1, 2], [3, 4, 5]].
        let stored = [0, 1, 2, 3, 4, 5];
        assert_eq!(in_order(&stored, &[3, 2], &[1, 3]), [0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn damaged_archives_are_errors() {
        for bytes in [&b"PK\x03\x04"[..], b"PK\x03\x04PK\x05\x06", &[0x50; 100]] {
            assert!(locate(bytes).is_err());
        }
    }
}
