//! The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), PyTorch's CPU engine.

const N: usize = 624;
const M: usize = 397;

/// The engine: 624 words and the position of the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mt19937 {
    words: Vec<u32>,
    next: usize,
}

impl Mt19937 {
    pub(super) fn new(seed: u32) -> Self {
        let mut words = Vec::with_capacity(N);
        let mut word = seed;
        words.push(word);
        for i in 1..N as u32 {
            word = 1_812_433_253u32
                .wrapping_mul(word ^ (word >> 30))
                .wrapping_add(i);
            words.push(word);
        }
        Self { words, next: N }
    }

    /// Rebuilds an engine from [`Self::words`] and [`Self::position`].
    pub(super) fn restore(words: Vec<u32>, next: usize) -> Option<Self> {
        (words.len() == N && next <= N).then_some(Self { words, next })
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    pub(super) fn position(&self) -> usize {
        self.next
    }

    fn twist(&mut self) {
        for i in 0..N {
            let joined = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % N] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[i] = self.words[(i + M) % N] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }

    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.words[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Two words, the first one high: PyTorch's `random64`.
    pub(super) fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.next_u32());
        high << 32 | u64::from(self.next_u32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_thousandth_output_is_the_published_one() {
        // C++ [rand.predef]: the 10000th output of a default mt19937 (seed 5489) is 4123659995.
        let mut engine = Mt19937::new(5489);
        let last = (0..10_000).map(|_| engine.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
