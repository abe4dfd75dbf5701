//! Column encodings: values to bytes and back.

use std::fmt;
use std::str::FromStr;

use super::Dtype;
use super::value::{Array, Pixels, Scalar, Value};
use crate::{DataError, Result, python_json};

/// How a column's values are stored. `pkl` is known by name only: unpickling runs code, so such
/// columns are read and copied as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoding {
    /// Bytes as they are.
    Bytes,
    /// UTF-8.
    Str,
    /// A 64-bit integer.
    Int,
    /// `ndarray[:dtype[:d0,d1,...]]`: what is not fixed is stored with each value.
    NdArray {
        /// The fixed type.
        dtype: Option<Dtype>,
        /// The fixed shape.
        shape: Option<Vec<usize>>,
    },
    /// A number of one type.
    Scalar(Dtype),
    /// `str_int`: digits.
    StrInt,
    /// `str_float`: digits.
    StrFloat,
    /// `str_decimal`: digits.
    StrDecimal,
    /// Raw pixels with size and mode.
    Pil,
    /// A JPEG file.
    Jpeg,
    /// A PNG file.
    Png,
    /// Several JPEG files.
    JpegArray,
    /// `list[pil]`, `list[jpeg]`, `list[png]`.
    List(Box<Encoding>),
    /// JSON text.
    Json,
    /// A Python pickle, kept as bytes.
    Pickle,
}

const PLAIN: [(&str, Encoding); 12] = [
    ("bytes", Encoding::Bytes),
    ("str", Encoding::Str),
    ("int", Encoding::Int),
    ("str_int", Encoding::StrInt),
    ("str_float", Encoding::StrFloat),
    ("str_decimal", Encoding::StrDecimal),
    ("pil", Encoding::Pil),
    ("jpeg", Encoding::Jpeg),
    ("png", Encoding::Png),
    ("jpeg_array", Encoding::JpegArray),
    ("json", Encoding::Json),
    ("pkl", Encoding::Pickle),
];

impl FromStr for Encoding {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || DataError::Unknown {
            what: "column encoding",
            name: name.to_owned(),
            expected: "bytes, str, int, uint8 ... float64, ndarray[:dtype[:shape]], str_int, \
                       str_float, str_decimal, pil, jpeg, png, jpeg_array, list[pil|jpeg|png] or json",
        };
        if let Some((_, plain)) = PLAIN.iter().find(|(known, _)| *known == name) {
            return Ok(plain.clone());
        }
        if let Some(dtype) = Dtype::from_name(name) {
            return Ok(Encoding::Scalar(dtype));
        }
        match name {
            "jpegarray" => return Ok(Encoding::JpegArray),
            "list[pil]" => return Ok(Encoding::List(Box::new(Encoding::Pil))),
            "list[jpeg]" => return Ok(Encoding::List(Box::new(Encoding::Jpeg))),
            "list[png]" => return Ok(Encoding::List(Box::new(Encoding::Png))),
            _ => {}
        }
        let mut parts = name.split(':');
        if parts.next() != Some("ndarray") {
            return Err(unknown());
        }
        let dtype = match parts.next() {
            None | Some("") => None,
            Some(text) => Some(Dtype::from_name(text).ok_or_else(unknown)?),
        };
        let side = |side: &str| side.trim().parse::<usize>().ok().filter(|side| *side > 0);
        let shape = match parts.next() {
            None => None,
            Some(text) => {
                let sides: Option<Vec<usize>> = text.split(',').map(side).collect();
                let elements =
                    |s: &Vec<usize>| s.iter().try_fold(8usize, |n, side| n.checked_mul(*side));
                Some(
                    sides
                        .filter(|s| elements(s).is_some())
                        .ok_or_else(unknown)?,
                )
            }
        };
        match (dtype, &shape, parts.next()) {
            (None, Some(_), _) | (_, _, Some(_)) => Err(unknown()),
            _ => Ok(Encoding::NdArray { dtype, shape }),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Encoding::Scalar(dtype) => write!(f, "{dtype}"),
            Encoding::List(inner) => write!(f, "list[{inner}]"),
            Encoding::NdArray { dtype, shape } => {
                f.write_str("ndarray")?;
                if let Some(dtype) = dtype {
                    write!(f, ":{dtype}")?;
                }
                if let Some(shape) = shape {
                    let sides: Vec<String> = shape.iter().map(usize::to_string).collect();
                    write!(f, ":{}", sides.join(","))?;
                }
                Ok(())
            }
            plain => {
                let known = PLAIN.iter().find(|(_, encoding)| encoding == plain);
                f.write_str(known.map_or("?", |(name, _)| name))
            }
        }
    }
}

/// What is wrong with a value or its bytes.
type Wrong<T> = std::result::Result<T, String>;

impl Encoding {
    /// Bytes of every value, where that is fixed.
    pub fn fixed_size(&self) -> Option<usize> {
        match self {
            Encoding::Int => Some(8),
            Encoding::Scalar(dtype) => Some(dtype.size()),
            Encoding::NdArray {
                dtype: Some(dtype),
                shape: Some(shape),
            } => Some(shape.iter().product::<usize>() * dtype.size()),
            _ => None,
        }
    }

    /// The bytes that store `value`. [`Value::Bytes`] passes as encoded already.
    ///
    /// # Errors
    /// A value of another kind than the encoding stores; the message says what was expected.
    pub fn encode(&self, value: &Value) -> Wrong<Vec<u8>> {
        let bytes = match (self, value) {
            (_, Value::Bytes(bytes)) => bytes.clone(),
            (Encoding::Str, Value::Str(text)) => text.clone().into_bytes(),
            (Encoding::Int, Value::Int(number)) => number.to_le_bytes().to_vec(),
            (Encoding::Scalar(dtype), Value::Scalar(number)) if number.dtype() == *dtype => {
                number.to_le_bytes()
            }
            (Encoding::NdArray { dtype, shape }, Value::Array(array)) => {
                encode_array(*dtype, shape.as_deref(), array)?
            }
            (Encoding::StrInt | Encoding::StrFloat | Encoding::StrDecimal, Value::Digits(text)) => {
                self.check_digits(text)?;
                text.clone().into_bytes()
            }
            (Encoding::Json, Value::Json(json)) => python_json::dumps(json)
                .map_err(|e| e.to_string())?
                .into_bytes(),
            (Encoding::Pil, Value::Pixels(pixels)) => encode_pixels(pixels)?,
            (Encoding::Jpeg | Encoding::Png, Value::Image(bytes)) => bytes.clone(),
            (Encoding::JpegArray, Value::List(items)) => encode_list(&[], &Encoding::Jpeg, items)?,
            // The first word is a placeholder of the format.
            (Encoding::List(inner), Value::List(items)) => encode_list(&[0; 4], inner, items)?,
            (_, other) => return Err(format!("{} stores no {}", self, kind(other))),
        };
        match self.fixed_size() {
            Some(size) if size != bytes.len() => {
                Err(format!("{} bytes, but {self} has {size}", bytes.len()))
            }
            _ => Ok(bytes),
        }
    }

    /// The value that `bytes` store.
    ///
    /// # Errors
    /// Bytes that are not of this encoding; the message says what was expected.
    pub fn decode(&self, bytes: &[u8]) -> Wrong<Value> {
        let text = || {
            let text = std::str::from_utf8(bytes);
            text.map_err(|e| format!("not UTF-8 after {} bytes", e.valid_up_to()))
        };
        let size = |expected: usize| match bytes.len() == expected {
            true => Ok(()),
            false => Err(format!("{} bytes, but {self} has {expected}", bytes.len())),
        };
        Ok(match self {
            Encoding::Bytes | Encoding::Pickle => Value::Bytes(bytes.to_vec()),
            Encoding::Str => Value::Str(text()?.to_owned()),
            Encoding::Int => {
                size(8)?;
                let mut word = [0; 8];
                word.copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(word))
            }
            Encoding::Scalar(dtype) => {
                size(dtype.size())?;
                let number = Scalar::from_le_bytes(*dtype, bytes);
                Value::Scalar(number.ok_or_else(|| format!("no {dtype}"))?)
            }
            Encoding::NdArray { dtype, shape } => {
                Value::Array(decode_array(*dtype, shape.as_deref(), bytes)?)
            }
            Encoding::StrInt | Encoding::StrFloat | Encoding::StrDecimal => {
                self.check_digits(text()?)?;
                Value::Digits(text()?.to_owned())
            }
            Encoding::Json => {
                Value::Json(serde_json::from_str(text()?).map_err(|e| format!("not JSON: {e}"))?)
            }
            Encoding::Pil => Value::Pixels(decode_pixels(bytes)?),
            Encoding::Jpeg if !bytes.starts_with(&[0xff, 0xd8]) => return Err("no JPEG".into()),
            Encoding::Png if !bytes.starts_with(b"\x89PNG") => return Err("no PNG".into()),
            Encoding::Jpeg | Encoding::Png => Value::Image(bytes.to_vec()),
            Encoding::JpegArray => Value::List(decode_list(0, &Encoding::Jpeg, bytes)?),
            Encoding::List(inner) => Value::List(decode_list(4, inner, bytes)?),
        })
    }

    fn check_digits(&self, text: &str) -> Wrong<()> {
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        let fine = match self {
            Encoding::StrInt => {
                !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
            }
            // Decimals have Python's float syntax, with any number of digits.
            _ => text.trim().parse::<f64>().is_ok(),
        };
        match fine {
            true => Ok(()),
            false => Err(format!("{text:?} is no number of encoding {self}")),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Bytes(_) => "bytes",
        Value::Str(_) => "text",
        Value::Int(_) => "int",
        Value::Scalar(number) => number.dtype().name(),
        Value::Array(_) => "array",
        Value::Digits(_) => "digits",
        Value::Json(_) => "JSON",
        Value::Pixels(_) => "pixels",
        Value::Image(_) => "encoded picture",
        Value::List(_) => "list",
    }
}

/// Cuts `count` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], count: usize, what: &str) -> Wrong<&'a [u8]> {
    let all = *bytes;
    let (front, rest) = all
        .split_at_checked(count)
        .ok_or_else(|| format!("ends within its {what}"))?;
    *bytes = rest;
    Ok(front)
}

fn take_u32(bytes: &mut &[u8], what: &str) -> Wrong<u32> {
    let mut word = [0; 4];
    word.copy_from_slice(take(bytes, 4, what)?);
    Ok(u32::from_le_bytes(word))
}

fn encode_array(dtype: Option<Dtype>, shape: Option<&[usize]>, array: &Array) -> Wrong<Vec<u8>> {
    let elements: usize = array.shape.iter().product();
    if elements * array.dtype.size() != array.data.len() || array.shape.len() > 63 || elements == 0
    {
        return Err(format!(
            "{} bytes do not make an array of {} of shape {:?}",
            array.data.len(),
            array.dtype,
            array.shape
        ));
    }
    let mut bytes = Vec::with_capacity(array.data.len() + 16);
    match dtype {
        None => bytes.push(array.dtype.code()),
        Some(dtype) if dtype == array.dtype => {}
        Some(dtype) => return Err(format!("an array of {}, expected {dtype}", array.dtype)),
    }
    match shape {
        None => {
            let largest = array.shape.iter().copied().max().unwrap_or(0) as u64;
            let width_code = match largest {
                0..=0xff => 0u8,
                0x100..=0xffff => 1,
                0x1_0000..=0xffff_ffff => 2,
                _ => 3,
            };
            bytes.push((array.shape.len() as u8) << 2 | width_code);
            for side in &array.shape {
                bytes.extend(&(*side as u64).to_le_bytes()[..1 << width_code]);
            }
        }
        Some(shape) if shape == array.shape => {}
        Some(shape) => return Err(format!("shape {:?}, expected {shape:?}", array.shape)),
    }
    bytes.extend(&array.data);
    Ok(bytes)
}

fn decode_array(dtype: Option<Dtype>, shape: Option<&[usize]>, bytes: &[u8]) -> Wrong<Array> {
    let mut rest = bytes;
    let dtype = match dtype {
        Some(dtype) => dtype,
        None => {
            let code = take(&mut rest, 1, "type")?[0];
            Dtype::from_code(code).ok_or_else(|| format!("no array type has code {code}"))?
        }
    };
    let shape = match shape {
        Some(shape) => shape.to_vec(),
        None => {
            let byte = take(&mut rest, 1, "number of sides")?[0];
            let width = 1usize << (byte & 3);
            let sides = take(&mut rest, usize::from(byte >> 2) * width, "shape")?;
            let side = |bytes: &[u8]| {
                let mut word = [0; 8];
                word[..width].copy_from_slice(bytes);
                usize::try_from(u64::from_le_bytes(word)).unwrap_or(usize::MAX)
            };
            sides.chunks_exact(width).map(side).collect()
        }
    };
    let bytes_expected = shape
        .iter()
        .try_fold(dtype.size(), |n: usize, side| n.checked_mul(*side));
    if bytes_expected != Some(rest.len()) {
        return Err(format!(
            "{} bytes do not make an array of {dtype} of shape {shape:?}",
            rest.len()
        ));
    }
    Ok(Array {
        dtype,
        shape,
        data: rest.to_vec(),
    })
}

/// Bytes of a pixel in PIL's modes of whole bytes.
fn bytes_per_pixel(mode: &str) -> Option<usize> {
    match mode {
        "L" | "P" => Some(1),
        "LA" | "I;16" => Some(2),
        "RGB" | "YCbCr" | "LAB" | "HSV" => Some(3),
        "RGBA" | "RGBX" | "CMYK" | "I" | "F" => Some(4),
        _ => None,
    }
}

fn check_pixels(width: u32, height: u32, mode: &str, data: &[u8]) -> Wrong<()> {
    let Some(size) = bytes_per_pixel(mode) else {
        return Ok(()); // bilevel and rare modes; kept as they are
    };
    let expected = u64::from(width) * u64::from(height) * size as u64;
    match data.len() as u64 == expected {
        true => Ok(()),
        false => Err(format!(
            "{} bytes, but {width} x {height} pixels of {mode} have {expected}",
            data.len()
        )),
    }
}

fn encode_pixels(pixels: &Pixels) -> Wrong<Vec<u8>> {
    let Pixels {
        width,
        height,
        mode,
        data,
    } = pixels;
    check_pixels(*width, *height, mode, data)?;
    let mut bytes = Vec::with_capacity(12 + mode.len() + data.len());
    for word in [*width, *height, mode.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(mode.as_bytes());
    bytes.extend(data);
    Ok(bytes)
}

fn decode_pixels(bytes: &[u8]) -> Wrong<Pixels> {
    let mut rest = bytes;
    let width = take_u32(&mut rest, "size")?;
    let height = take_u32(&mut rest, "size")?;
    let mode_size = take_u32(&mut rest, "mode")? as usize;
    let mode = String::from_utf8(take(&mut rest, mode_size, "mode")?.to_vec())
        .map_err(|_| "its mode is not UTF-8")?;
    check_pixels(width, height, &mode, rest)?;
    Ok(Pixels {
        width,
        height,
        mode,
        data: rest.to_vec(),
    })
}

/// `prefix`, number of items, their sizes, the items.
fn encode_list(prefix: &[u8], inner: &Encoding, items: &[Value]) -> Wrong<Vec<u8>> {
    let items: Vec<Vec<u8>> = items
        .iter()
        .map(|item| inner.encode(item))
        .collect::<Wrong<_>>()?;
    let mut bytes = prefix.to_vec();
    bytes.extend((items.len() as u32).to_le_bytes());
    for item in &items {
        bytes.extend((item.len() as u32).to_le_bytes());
    }
    items.iter().for_each(|item| bytes.extend(item));
    Ok(bytes)
}

fn decode_list(prefix: usize, inner: &Encoding, bytes: &[u8]) -> Wrong<Vec<Value>> {
    let mut rest = bytes;
    take(&mut rest, prefix, "head")?;
    let count = take_u32(&mut rest, "count")? as usize;
    let table = count.checked_mul(4).ok_or("too many items")?;
    let mut sizes = take(&mut rest, table, "sizes")?;
    (0..count)
        .map(|_| {
            let size = take_u32(&mut sizes, "sizes")? as usize;
            inner.decode(take(&mut rest, size, "items")?)
        })
        .collect()
}
