//! Decoded columns.

use half::f16;

use super::Dtype;

/// A column's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `bytes`; and, when writing, any column's bytes that are encoded already.
    Bytes(Vec<u8>),
    /// `str`.
    Str(String),
    /// `int`: 64 bits.
    Int(i64),
    /// `uint8` ... `float64`.
    Scalar(Scalar),
    /// `ndarray`.
    Array(Array),
    /// `str_int`, `str_float`, `str_decimal`: a number as its digits.
    Digits(String),
    /// `json`.
    Json(serde_json::Value),
    /// `pil`: pixels as they are.
    Pixels(Pixels),
    /// `jpeg` and `png`: a whole encoded picture.
    Image(Vec<u8>),
    /// `jpeg_array`, `list[pil]`, `list[jpeg]`, `list[png]`.
    List(Vec<Value>),
}

impl Value {
    /// Raw `float16` values, as the official pipeline stores latents and features
    /// ([`Sample::f16s`](super::Sample::f16s) reads them).
    pub fn f16s(values: &[f32]) -> Self {
        let bytes = |value: &f32| f16::from_f32(*value).to_le_bytes();
        Self::Bytes(values.iter().flat_map(bytes).collect())
    }

    /// Raw `int64` values, as the official pipeline stores masks.
    pub fn i64s(values: impl IntoIterator<Item = i64>) -> Self {
        Self::Bytes(values.into_iter().flat_map(i64::to_le_bytes).collect())
    }
}

/// A number with its type.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the names say it
pub enum Scalar {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    F16(f16),
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    I64(i64),
    F64(f64),
}

macro_rules! each_scalar {
    ($self:expr, $number:ident => $body:expr) => {
        match $self {
            Scalar::U8($number) => $body,
            Scalar::I8($number) => $body,
            Scalar::U16($number) => $body,
            Scalar::I16($number) => $body,
            Scalar::F16($number) => $body,
            Scalar::U32($number) => $body,
            Scalar::I32($number) => $body,
            Scalar::F32($number) => $body,
            Scalar::U64($number) => $body,
            Scalar::I64($number) => $body,
            Scalar::F64($number) => $body,
        }
    };
}

impl Scalar {
    /// Its type.
    pub fn dtype(self) -> Dtype {
        match self {
            Scalar::U8(_) => Dtype::U8,
            Scalar::I8(_) => Dtype::I8,
            Scalar::U16(_) => Dtype::U16,
            Scalar::I16(_) => Dtype::I16,
            Scalar::F16(_) => Dtype::F16,
            Scalar::U32(_) => Dtype::U32,
            Scalar::I32(_) => Dtype::I32,
            Scalar::F32(_) => Dtype::F32,
            Scalar::U64(_) => Dtype::U64,
            Scalar::I64(_) => Dtype::I64,
            Scalar::F64(_) => Dtype::F64,
        }
    }

    /// Its bytes, little endian.
    pub fn to_le_bytes(self) -> Vec<u8> {
        each_scalar!(self, number => number.to_le_bytes().to_vec())
    }

    /// The number in `bytes`, which must have the type's size.
    pub fn from_le_bytes(dtype: Dtype, bytes: &[u8]) -> Option<Self> {
        Some(match dtype {
            Dtype::U8 => Scalar::U8(u8::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::I8 => Scalar::I8(i8::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::U16 => Scalar::U16(u16::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::I16 => Scalar::I16(i16::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::F16 => Scalar::F16(f16::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::U32 => Scalar::U32(u32::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::I32 => Scalar::I32(i32::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::F32 => Scalar::F32(f32::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::U64 => Scalar::U64(u64::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::I64 => Scalar::I64(i64::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::F64 => Scalar::F64(f64::from_le_bytes(bytes.try_into().ok()?)),
        })
    }

    /// The nearest `f64`.
    pub fn to_f64(self) -> f64 {
        match self {
            Scalar::U64(number) => number as f64,
            Scalar::I64(number) => number as f64,
            Scalar::F16(number) => number.to_f64(),
            Scalar::U8(number) => number.into(),
            Scalar::I8(number) => number.into(),
            Scalar::U16(number) => number.into(),
            Scalar::I16(number) => number.into(),
            Scalar::U32(number) => number.into(),
            Scalar::I32(number) => number.into(),
            Scalar::F32(number) => number.into(),
            Scalar::F64(number) => number,
        }
    }
}

/// An array: row-major values, little endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Type of the values.
    pub dtype: Dtype,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
    /// The values' bytes.
    pub data: Vec<u8>,
}

impl Array {
    /// The values as the nearest `f32`.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data
            .chunks_exact(self.dtype.size())
            .filter_map(|bytes| Scalar::from_le_bytes(self.dtype, bytes))
            .map(|number| number.to_f64() as f32)
            .collect()
    }
}

/// A picture as PIL keeps it in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// PIL's mode: `RGB`, `L`, `RGBA`, ...
    pub mode: String,
    /// Rows top to bottom.
    pub data: Vec<u8>,
}
