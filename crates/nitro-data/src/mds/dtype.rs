use std::fmt;

/// A number type of arrays and scalars, by NumPy's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names say it
pub enum Dtype {
    U8,
    I8,
    U16,
    I16,
    F16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

/// Type, NumPy's name, the code that MDS stores in arrays of dynamic type.
const TABLE: [(Dtype, &str, u8); 11] = [
    (Dtype::U8, "uint8", 8),
    (Dtype::I8, "int8", 9),
    (Dtype::U16, "uint16", 16),
    (Dtype::I16, "int16", 17),
    (Dtype::F16, "float16", 18),
    (Dtype::U32, "uint32", 32),
    (Dtype::I32, "int32", 33),
    (Dtype::F32, "float32", 34),
    (Dtype::U64, "uint64", 64),
    (Dtype::I64, "int64", 65),
    (Dtype::F64, "float64", 66),
];

impl Dtype {
    fn row(self) -> (Dtype, &'static str, u8) {
        // The table is in the order of the enumeration.
        TABLE[self as usize]
    }

    /// NumPy's name, such as `float16`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes of one value.
    pub fn size(self) -> usize {
        usize::from(self.row().2 & !7) / 8
    }

    /// The code in arrays of dynamic type.
    pub fn code(self) -> u8 {
        self.row().2
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The type of this code.
    pub fn from_code(code: u8) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == code).map(|row| row.0)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_codes_and_sizes_belong_together() {
        for (i, (dtype, name, code)) in TABLE.into_iter().enumerate() {
            assert_eq!(dtype as usize, i);
            assert_eq!(Dtype::from_name(name), Some(dtype));
            assert_eq!(Dtype::from_code(code), Some(dtype));
        }
        let sizes: Vec<usize> = TABLE.iter().map(|row| row.0.size()).collect();
        assert_eq!(sizes, [1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]);
        assert_eq!(Dtype::from_name("bfloat16"), None);
    }
}
