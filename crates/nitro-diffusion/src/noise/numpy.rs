use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// `numpy.random.default_rng(seed)`: SeedSequence into PCG64 (XSL-RR 128/64).
///
/// Every draw is exact. Lists and arrays shuffle alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumpyGenerator {
    state: u128,
    increment: u128,
    /// The high half of the last 64-bit output, if a 32-bit draw used only the low half.
    spare: Option<u32>,
}

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

impl NumpyGenerator {
    /// `default_rng(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        if high == 0 {
            Self::from_words(&[low])
        } else {
            Self::from_words(&[low, high])
        }
    }

    /// `default_rng([w0, w1, ...])` for entropy words below 2^32.
    pub fn from_words(entropy: &[u32]) -> Self {
        let words = seed_sequence(entropy);
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let mut generator = Self {
            state: 0,
            increment: wide(words[2], words[3]) << 1 | 1,
            spare: None,
        };
        generator.step();
        generator.state = generator.state.wrapping_add(wide(words[0], words[1]));
        generator.step();
        generator
    }

    /// The 128-bit state and increment, as `bit_generator.state` shows them.
    pub fn state(&self) -> (u128, u128) {
        (self.state, self.increment)
    }

    fn step(&mut self) {
        self.state = self
            .state
            .wrapping_mul(MULTIPLIER)
            .wrapping_add(self.increment);
    }

    /// The next 64-bit output.
    pub fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The next 32-bit output: the low half of a 64-bit output, then its high half.
    pub fn next_u32(&mut self) -> u32 {
        self.spare.take().unwrap_or_else(|| {
            let word = self.next_u64();
            self.spare = Some((word >> 32) as u32);
            word as u32
        })
    }

    /// `rng.random(count)`: uniform in `[0, 1)` with 53 random bits.
    pub fn random(&mut self, count: usize) -> Vec<f64> {
        (0..count)
            .map(|_| (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64))
            .collect()
    }

    /// `rng.integers(low, high, count)`: integers in `[low, high)`.
    pub fn integers(&mut self, low: i64, high: i64, count: usize) -> Result<Vec<i64>> {
        if low >= high {
            return Err(Error::Draw {
                op: "integers",
                what: format!("no integers in [{low}, {high}); expected low < high"),
            });
        }
        let most = high.wrapping_sub(low).wrapping_sub(1) as u64;
        Ok((0..count)
            .map(|_| low.wrapping_add(self.bounded(most) as i64))
            .collect())
    }

    /// `rng.shuffle(items)`, in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.interval(i as u64) as usize);
        }
    }

    /// `rng.permutation(count)`: the numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<i64> {
        let mut order: Vec<i64> = (0..count as i64).collect();
        self.shuffle(&mut order);
        order
    }

    /// `rng.choice(population, count, replace=False)`: distinct numbers below `population`.
    pub fn choice(&mut self, population: usize, count: usize) -> Result<Vec<i64>> {
        if count > population {
            return Err(Error::Draw {
                op: "choice",
                what: format!("{count} distinct numbers asked of {population}"),
            });
        }
        if population > 10_000 && count > population / 50 {
            // Many of many: shuffle only the tail and take it.
            let mut all: Vec<i64> = (0..population as i64).collect();
            self.shuffle_bounded(&mut all, (population - count).max(1));
            return Ok(all.split_off(population - count));
        }
        // Floyd's sampling, then a shuffle because the order of the sample is not uniform.
        let mut seen = std::collections::HashSet::with_capacity(count);
        let mut chosen = Vec::with_capacity(count);
        for last in population - count..population {
            let mut pick = self.bounded(last as u64);
            if !seen.insert(pick) {
                pick = last as u64;
                seen.insert(pick);
            }
            chosen.push(pick as i64);
        }
        self.shuffle_bounded(&mut chosen, 1);
        Ok(chosen)
    }

    /// NumPy's shuffle inside `choice`, which draws its bounds unlike `shuffle`.
    fn shuffle_bounded(&mut self, items: &mut [i64], first: usize) {
        for i in (first..items.len()).rev() {
            items.swap(i, self.bounded(i as u64) as usize);
        }
    }

    /// A number in `[0, most]` by masking and rejection.
    fn interval(&mut self, most: u64) -> u64 {
        if most == 0 {
            return 0;
        }
        let mask = u64::MAX >> most.leading_zeros();
        loop {
            let value = mask
                & if most <= u64::from(u32::MAX) {
                    u64::from(self.next_u32())
                } else {
                    self.next_u64()
                };
            if value <= most {
                return value;
            }
        }
    }

    /// A number in `[0, most]` by Lemire's multiplication (arXiv 1805.10941).
    fn bounded(&mut self, most: u64) -> u64 {
        if most == 0 {
            return 0;
        }
        if most == u64::from(u32::MAX) {
            return u64::from(self.next_u32());
        }
        if most == u64::MAX {
            return self.next_u64();
        }
        if most < u64::from(u32::MAX) {
            let range = most as u32 + 1;
            let threshold = range.wrapping_neg() % range;
            loop {
                let product = u64::from(self.next_u32()) * u64::from(range);
                if product as u32 >= threshold {
                    return product >> 32;
                }
            }
        }
        let range = most + 1;
        let threshold = range.wrapping_neg() % range;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(range);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }
}

/// NumPy's SeedSequence: entropy words mixed into a pool of four, then four 64-bit outputs.
fn seed_sequence(entropy: &[u32]) -> [u64; 4] {
    const POOL: usize = 4;
    let fold = |value: u32| value ^ (value >> 16);
    let mut constant: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        fold(value.wrapping_mul(constant))
    };
    let mix = |x: u32, y: u32| {
        fold(
            x.wrapping_mul(0xca01_f9dd)
                .wrapping_sub(y.wrapping_mul(0x4973_f715)),
        )
    };
    let mut pool = [0u32; POOL];
    for (i, slot) in pool.iter_mut().enumerate() {
        *slot = hash(entropy.get(i).copied().unwrap_or(0));
    }
    for source in 0..POOL {
        for target in (0..POOL).filter(|&target| target != source) {
            pool[target] = mix(pool[target], hash(pool[source]));
        }
    }
    for &word in entropy.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = mix(*slot, hash(word));
        }
    }
    let mut constant: u32 = 0x8b51_f9dd;
    let mut words = pool.iter().cycle().map(|&word| {
        let word = word ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        u64::from(fold(word.wrapping_mul(constant)))
    });
    std::array::from_fn(|_| {
        let low = words.next().unwrap_or(0);
        low | words.next().unwrap_or(0) << 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choice_gives_distinct_numbers_of_the_population() {
        let mut rng = NumpyGenerator::new(4);
        for (population, count) in [(1, 1), (30, 30), (20_000, 15), (20_000, 9_000), (7, 0)] {
            let mut chosen = rng.choice(population, count).unwrap();
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), count);
            assert!(chosen.iter().all(|&x| (0..population as i64).contains(&x)));
        }
        assert!(rng.choice(3, 4).is_err());
    }

    #[test]
    fn wide_seeds_and_entropy_lists_differ_from_their_low_word() {
        let low = NumpyGenerator::new(7);
        assert_ne!(NumpyGenerator::new(7 | 1 << 40), low);
        assert_ne!(NumpyGenerator::from_words(&[7, 0, 0, 0, 1]), low);
        // numpy: default_rng(7) and default_rng([7]) are the same stream.
        assert_eq!(NumpyGenerator::from_words(&[7]), low);
    }

    #[test]
    fn wide_draws_repeat_numpy() {
        // Printed by numpy 2.1.3.
        let mut rng = NumpyGenerator::new((1 << 40) + 7);
        assert_eq!(
            rng.integers(0, 1 << 40, 3).unwrap(),
            [912_388_923_444, 280_710_990_236, 169_094_680_324]
        );
        assert_eq!(
            rng.integers(0, 1 << 32, 3).unwrap(),
            [2_167_716_235, 2_896_974_965, 3_801_854_056]
        );
        assert_eq!(rng.random(1), [0.489_995_416_508_636_76]);
        assert_eq!(
            rng.choice(20_000, 15_000).unwrap()[..4],
            [7737, 3848, 6881, 4158]
        );
        let mut rng = NumpyGenerator::from_words(&[7, 0, 0, 0, 1]);
        assert_eq!(
            rng.integers(i64::MIN, i64::MAX, 2).unwrap(),
            [-358_198_770_616_239_471, -8_125_019_567_498_544_477]
        );
    }

    #[test]
    fn integers_reach_both_ends_and_no_further() {
        let mut rng = NumpyGenerator::new(0);
        let draws = rng.integers(-2, 3, 2_000).unwrap();
        assert_eq!(draws.iter().min(), Some(&-2));
        assert_eq!(draws.iter().max(), Some(&2));
        assert!(rng.integers(5, 5, 1).is_err());
        assert!(rng.integers(i64::MIN, i64::MAX, 3).is_ok());
    }
}
