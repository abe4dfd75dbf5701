use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::mt19937::Mt19937;
use crate::{Error, Result};

/// Elements per block of PyTorch's vectorised normal generator; fewer than this go another way.
const BLOCK: usize = 16;

/// `torch.Generator("cpu")`: the same numbers as PyTorch for the same seed and calls.
///
/// Floating-point results agree with PyTorch's to the last bits of its vectorised logarithm and
/// cosine (about 1e-6); integers, uniforms and everything's consumption of the stream are exact.
/// Where releases of PyTorch differ, this follows 2.15. Serialises, so that a training run resumes
/// with the numbers it would have had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "State", into = "State")]
pub struct CpuGenerator {
    engine: Mt19937,
    /// The second half of the last Box-Muller pair of a small draw, kept for the next small draw.
    spare: Option<f64>,
}

/// The serialised form of [`CpuGenerator`].
#[derive(Clone, Serialize, Deserialize)]
struct State {
    words: Vec<u32>,
    position: usize,
    spare: Option<f64>,
}

impl From<CpuGenerator> for State {
    fn from(generator: CpuGenerator) -> Self {
        Self {
            words: generator.engine.words().to_vec(),
            position: generator.engine.position(),
            spare: generator.spare,
        }
    }
}

impl TryFrom<State> for CpuGenerator {
    type Error = Error;

    fn try_from(state: State) -> Result<Self> {
        let (len, position) = (state.words.len(), state.position);
        let engine = Mt19937::restore(state.words, position).ok_or_else(|| Error::State {
            generator: "torch CPU generator",
            what: format!(
                "{len} words at position {position}; expected 624 words, position 0 to 624"
            ),
        })?;
        Ok(Self {
            engine,
            spare: state.spare,
        })
    }
}

impl CpuGenerator {
    /// A generator after `manual_seed(seed)`. Only the low 32 bits of the seed count, as in PyTorch.
    pub fn new(seed: u64) -> Self {
        Self {
            engine: Mt19937::new(seed as u32),
            spare: None,
        }
    }

    /// The next raw 32-bit word.
    pub fn next_u32(&mut self) -> u32 {
        self.engine.next_u32()
    }

    /// The next raw 64-bit word (two 32-bit words, the first one high).
    pub fn next_u64(&mut self) -> u64 {
        self.engine.next_u64()
    }

    /// `torch.rand(count)`: uniform in `[0, 1)` with 24 random bits.
    pub fn rand(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.uniform_f32()).collect()
    }

    /// `torch.rand(count, dtype=torch.float64)`: uniform in `[0, 1)` with 53 random bits.
    pub fn rand_f64(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.uniform_f64()).collect()
    }

    /// `torch.rand(count, dtype=torch.bfloat16)`: the `f32` values, rounded.
    pub fn rand_bf16(&mut self, count: usize) -> Vec<bf16> {
        (0..count)
            .map(|_| bf16::from_f32(self.uniform_f32()))
            .collect()
    }

    /// `torch.rand(count, dtype=torch.float16)`: the `f32` values, rounded.
    pub fn rand_f16(&mut self, count: usize) -> Vec<f16> {
        (0..count)
            .map(|_| f16::from_f32(self.uniform_f32()))
            .collect()
    }

    /// `torch.randn(count)`: standard normal.
    ///
    /// Counts below 16 and from 16 on are different sequences, as in PyTorch.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        self.normal(count, 0.0, 1.0)
    }

    /// `torch.empty(count).normal_(mean, std)`, also `torch.normal(mean, std, (count,))`.
    pub fn normal(&mut self, count: usize, mean: f64, std: f64) -> Vec<f32> {
        if count < BLOCK {
            return self.small_normal(count, mean, std, |x| x as f32);
        }
        let (mean, std) = (mean as f32, std as f32);
        let mut values = self.rand(count);
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller_f32(block, mean, std);
        }
        if !count.is_multiple_of(BLOCK) {
            let tail = &mut values[count - BLOCK..];
            tail.fill_with(|| self.uniform_f32());
            box_muller_f32(tail, mean, std);
        }
        values
    }

    /// `torch.randn(count, dtype=torch.float64)`.
    pub fn randn_f64(&mut self, count: usize) -> Vec<f64> {
        if count < BLOCK {
            return self.small_normal(count, 0.0, 1.0, |x| x);
        }
        let mut values = self.rand_f64(count);
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller_f64(block);
        }
        if !count.is_multiple_of(BLOCK) {
            let tail = &mut values[count - BLOCK..];
            tail.fill_with(|| self.uniform_f64());
            box_muller_f64(tail);
        }
        values
    }

    /// `torch.randn(count, dtype=torch.bfloat16)`. Not the rounded `f32` draw when `count` is over
    /// 16 and no multiple of 16: the half types draw block by block.
    pub fn randn_bf16(&mut self, count: usize) -> Vec<bf16> {
        self.half_normal(count, bf16::from_f32)
    }

    /// `torch.randn(count, dtype=torch.float16)`; see [`Self::randn_bf16`].
    pub fn randn_f16(&mut self, count: usize) -> Vec<f16> {
        self.half_normal(count, f16::from_f32)
    }

    /// `torch.randint(low, high, (count,))`: integers in `[low, high)`.
    pub fn randint(&mut self, low: i64, high: i64, count: usize) -> Result<Vec<i64>> {
        if low >= high {
            return Err(Error::Draw {
                op: "randint",
                what: format!("no integers in [{low}, {high}); expected low < high"),
            });
        }
        let range = high.wrapping_sub(low) as u64;
        Ok((0..count)
            .map(|_| {
                let word = if range < 1 << 28 {
                    u64::from(self.next_u32())
                } else {
                    self.next_u64()
                };
                low.wrapping_add((word % range) as i64)
            })
            .collect())
    }

    /// `torch.randperm(count)`: the numbers below `count` in random order.
    pub fn randperm(&mut self, count: usize) -> Vec<i64> {
        let mut order: Vec<i64> = (0..count as i64).collect();
        let small = count < u32::MAX as usize / 20;
        for i in 0..count.saturating_sub(1) {
            let word = if small {
                u64::from(self.next_u32())
            } else {
                self.next_u64()
            };
            order.swap(i, i + (word % (count - i) as u64) as usize);
        }
        order
    }

    /// `torch.empty(count).bernoulli_(p)`: true with probability `p`.
    pub fn bernoulli(&mut self, p: f64, count: usize) -> Result<Vec<bool>> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::Draw {
                op: "bernoulli",
                what: format!("probability {p}; expected a value in [0, 1]"),
            });
        }
        Ok((0..count).map(|_| self.uniform_f64() < p).collect())
    }

    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Fewer than 16 values: Box-Muller in `f64`, one pair for two values, the second kept for later.
    fn small_normal<T>(
        &mut self,
        count: usize,
        mean: f64,
        std: f64,
        convert: impl Fn(f64) -> T,
    ) -> Vec<T> {
        (0..count)
            .map(|_| {
                let unit = self.spare.take().unwrap_or_else(|| {
                    let angle = std::f64::consts::TAU * self.uniform_f64();
                    let radius = (-2.0 * (-self.uniform_f64()).ln_1p()).sqrt();
                    self.spare = Some(radius * angle.sin());
                    radius * angle.cos()
                });
                convert(unit * std + mean)
            })
            .collect()
    }

    fn half_normal<T: Copy>(&mut self, count: usize, round: impl Fn(f32) -> T) -> Vec<T> {
        if count < BLOCK {
            return self.small_normal(count, 0.0, 1.0, |x| round(x as f32));
        }
        let mut block = [0.0; BLOCK];
        let mut values = Vec::with_capacity(count + BLOCK);
        while values.len() < count {
            block.fill_with(|| self.uniform_f32());
            box_muller_f32(&mut block, 0.0, 1.0);
            // The last, partial block ends the output and overwrites values before it.
            values.truncate(count - BLOCK);
            values.extend(block.iter().map(|&x| round(x)));
        }
        values
    }
}

/// Turns 16 uniforms into normals: element `j` and `j + 8` form a pair.
///
/// The products round to `f32` like PyTorch's; logarithm and cosine go through `f64` so that every
/// platform gives the same bits.
fn box_muller_f32(block: &mut [f32], mean: f32, std: f32) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let log = f64::from(1.0 - *a).ln() as f32;
        let radius = (-2.0 * log).sqrt();
        let (sin, cos) = f64::from(std::f32::consts::TAU * *b).sin_cos();
        *a = radius * cos as f32 * std + mean;
        *b = radius * sin as f32 * std + mean;
    }
}

fn box_muller_f64(block: &mut [f64]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * *b).sin_cos();
        *a = radius * cos;
        *b = radius * sin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_generator_continues_the_stream() {
        let mut generator = CpuGenerator::new(11);
        generator.randn(700);
        generator.randn(3);
        let saved = serde_json::to_string(&generator).unwrap();
        let mut restored: CpuGenerator = serde_json::from_str(&saved).unwrap();
        assert_eq!(restored.randn(5), generator.randn(5));
        assert_eq!(restored.randperm(9), generator.randperm(9));
    }

    #[test]
    fn a_truncated_state_is_refused() {
        let error = serde_json::from_str::<CpuGenerator>(
            r#"{"words": [1, 2], "position": 0, "spare": null}"#,
        )
        .unwrap_err();
        assert!(error.to_string().contains("expected 624 words"), "{error}");
    }

    #[test]
    fn bad_bounds_are_refused() {
        let mut generator = CpuGenerator::new(0);
        assert!(generator.randint(3, 3, 1).is_err());
        assert!(generator.bernoulli(1.5, 1).is_err());
        assert!(generator.bernoulli(f64::NAN, 1).is_err());
        assert_eq!(generator, CpuGenerator::new(0), "nothing was consumed");
    }

    #[test]
    fn empty_draws_are_empty() {
        let mut generator = CpuGenerator::new(0);
        assert!(generator.randn(0).is_empty());
        assert!(generator.randn_bf16(0).is_empty());
        assert!(generator.randperm(0).is_empty());
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let draws = CpuGenerator::new(1).randn(1 << 16);
        let n = draws.len() as f64;
        let mean = draws.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = draws
            .iter()
            .map(|&x| (f64::from(x) - mean).powi(2))
            .sum::<f64>()
            / n;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02);
    }
}
