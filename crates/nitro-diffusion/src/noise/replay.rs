//! Recorded generator calls as data: run them again and compare the results.
//!
//! The operations deserialise from the call lists of the golden suites `torch_rng/*`, so one loop
//! checks any recording: make a generator from the seed, [`TorchOp::run`] each step, compare.

use half::{bf16, f16};
use serde::Deserialize;

use super::{CpuGenerator, NumpyGenerator};
use crate::Result;

/// Element type of a recorded floating-point draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatKind {
    /// 32 bits.
    #[default]
    Float32,
    /// 64 bits.
    Float64,
    /// bfloat16.
    Bfloat16,
    /// IEEE half.
    Float16,
}

/// The values of one recorded call, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum Draw {
    /// `float32`, also booleans as 0 and 1.
    F32(Vec<f32>),
    /// `float64`.
    F64(Vec<f64>),
    /// `bfloat16`.
    Bf16(Vec<bf16>),
    /// `float16`.
    F16(Vec<f16>),
    /// `int64`.
    I64(Vec<i64>),
}

/// One call of a torch CPU generator.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum TorchOp {
    /// Standard normal.
    Randn {
        /// Dimensions of the tensor.
        shape: Vec<usize>,
        /// Its element type.
        #[serde(default)]
        dtype: FloatKind,
    },
    /// Uniform in `[0, 1)`.
    Rand {
        /// Dimensions of the tensor.
        shape: Vec<usize>,
        /// Its element type.
        #[serde(default)]
        dtype: FloatKind,
    },
    /// Normal, `float32`.
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        std: f64,
        /// Dimensions of the tensor.
        shape: Vec<usize>,
    },
    /// Integers in `[low, high)`.
    Randint {
        /// Lowest value.
        low: i64,
        /// First value too high.
        high: i64,
        /// Dimensions of the tensor.
        shape: Vec<usize>,
    },
    /// A permutation of the numbers below `n`.
    Randperm {
        /// How many.
        n: usize,
    },
    /// Ones with probability `p`, `float32`.
    Bernoulli {
        /// The probability.
        p: f64,
        /// Dimensions of the tensor.
        shape: Vec<usize>,
    },
}

impl TorchOp {
    /// Performs the call.
    pub fn run(&self, rng: &mut CpuGenerator) -> Result<Draw> {
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        Ok(match self {
            Self::Randn { shape, dtype } => {
                let count = size(shape);
                match dtype {
                    FloatKind::Float32 => Draw::F32(rng.randn(count)),
                    FloatKind::Float64 => Draw::F64(rng.randn_f64(count)),
                    FloatKind::Bfloat16 => Draw::Bf16(rng.randn_bf16(count)),
                    FloatKind::Float16 => Draw::F16(rng.randn_f16(count)),
                }
            }
            Self::Rand { shape, dtype } => {
                let count = size(shape);
                match dtype {
                    FloatKind::Float32 => Draw::F32(rng.rand(count)),
                    FloatKind::Float64 => Draw::F64(rng.rand_f64(count)),
                    FloatKind::Bfloat16 => Draw::Bf16(rng.rand_bf16(count)),
                    FloatKind::Float16 => Draw::F16(rng.rand_f16(count)),
                }
            }
            Self::Normal { mean, std, shape } => Draw::F32(rng.normal(size(shape), *mean, *std)),
            Self::Randint { low, high, shape } => {
                Draw::I64(rng.randint(*low, *high, size(shape))?)
            }
            Self::Randperm { n } => Draw::I64(rng.randperm(*n)),
            Self::Bernoulli { p, shape } => Draw::F32(
                rng.bernoulli(*p, size(shape))?
                    .into_iter()
                    .map(|hit| f32::from(u8::from(hit)))
                    .collect(),
            ),
        })
    }
}

/// One call of a `numpy.random.default_rng` generator.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum NumpyOp {
    /// `shuffle` of the list `[0, ..., n - 1]`.
    #[serde(alias = "shuffle_array", alias = "shuffle_list_1")]
    ShuffleList {
        /// How many.
        n: usize,
    },
    /// `shuffle` of `view[begin:end]` of the numbers below `n`.
    ShuffleArraySlice {
        /// How many.
        n: usize,
        /// First position shuffled.
        begin: usize,
        /// First position not shuffled.
        end: usize,
    },
    /// `permutation(n)`.
    Permutation {
        /// How many.
        n: usize,
    },
    /// `choice(n, k, replace=False)`.
    ChoiceNoReplace {
        /// The population.
        n: usize,
        /// How many are chosen.
        k: usize,
    },
    /// `random(size)`.
    Random {
        /// How many; recordings that leave it out take it from the recorded output.
        size: Option<usize>,
    },
    /// `integers(low, high, size)`.
    Integers {
        /// Lowest value.
        low: i64,
        /// First value too high.
        high: i64,
        /// How many.
        size: usize,
    },
}

impl NumpyOp {
    /// Performs the call; `recorded_len` is the length of the recorded output.
    pub fn run(&self, rng: &mut NumpyGenerator, recorded_len: usize) -> Result<Draw> {
        Ok(match *self {
            Self::ShuffleList { n } | Self::Permutation { n } => Draw::I64(rng.permutation(n)),
            Self::ShuffleArraySlice { n, begin, end } => {
                let mut items: Vec<i64> = (0..n as i64).collect();
                let view = items.get_mut(begin..end).ok_or(crate::Error::Draw {
                    op: "shuffle",
                    what: format!("view {begin}..{end} of {n} items"),
                })?;
                rng.shuffle(view);
                Draw::I64(items)
            }
            Self::ChoiceNoReplace { n, k } => Draw::I64(rng.choice(n, k)?),
            Self::Random { size } => Draw::F64(rng.random(size.unwrap_or(recorded_len))),
            Self::Integers { low, high, size } => Draw::I64(rng.integers(low, high, size)?),
        })
    }
}
