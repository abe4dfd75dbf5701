use serde::{Deserialize, Serialize};

/// Threads per block and values per thread and call in PyTorch's random kernels.
const BLOCK: u64 = 256;
const PER_CALL: u64 = 4;

/// What of a CUDA device decides which thread makes which element.
///
/// PyTorch starts one thread per element until the device is full; only draws larger than that
/// differ between devices. A full H100 is 270,336 threads: 33 latents of Nitro-E at 512 px.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CudaDevice {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Resident threads per multiprocessor.
    pub threads_per_multiprocessor: u32,
}

impl CudaDevice {
    /// NVIDIA H100 SXM and H200.
    pub const H100: Self = Self::new(132, 2048);
    /// NVIDIA A100.
    pub const A100: Self = Self::new(108, 2048);
    /// NVIDIA GeForce RTX 4090.
    pub const RTX_4090: Self = Self::new(128, 1536);
    /// NVIDIA GeForce RTX 3090.
    pub const RTX_3090: Self = Self::new(82, 1536);
    /// A device no draw can fill: what other re-implementations ("NV" noise) assume.
    pub const UNBOUNDED: Self = Self::new(u32::MAX, 2048);

    /// A device by its properties.
    pub const fn new(multiprocessors: u32, threads_per_multiprocessor: u32) -> Self {
        Self {
            multiprocessors,
            threads_per_multiprocessor,
        }
    }

    /// Threads of the launch that fills `count` values.
    fn threads(self, count: u64) -> u64 {
        let resident = u64::from(self.multiprocessors)
            * (u64::from(self.threads_per_multiprocessor) / BLOCK).max(1);
        BLOCK * count.div_ceil(BLOCK).min(resident.max(1))
    }
}

impl Default for CudaDevice {
    fn default() -> Self {
        Self::UNBOUNDED
    }
}

/// `torch.Generator("cuda")`: the numbers a GPU would draw, made on the CPU.
///
/// Thread `t` of a launch owns the Philox4x32-10 stream whose counter holds `t` in its high half and
/// the generator's offset / 4 in its low half; the seed is the key. One call makes four values for a
/// thread, which lie a whole launch apart in the output. Normals come from Box-Muller on words
/// (0, 1) and (2, 3), sine first (curand's `curand_normal4`). A GPU uses approximate sine and
/// logarithm there, so values agree to about 1e-6, not to the bit. Half-precision draws on a GPU are
/// these values, rounded; `float64` draws are another sequence and not offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaGenerator {
    seed: u64,
    offset: u64,
    device: CudaDevice,
}

impl CudaGenerator {
    /// A generator after `manual_seed(seed)` on a device larger than any draw.
    pub fn new(seed: u64) -> Self {
        Self::on(CudaDevice::UNBOUNDED, seed)
    }

    /// A generator after `manual_seed(seed)` on this device.
    pub fn on(device: CudaDevice, seed: u64) -> Self {
        Self {
            seed,
            offset: 0,
            device,
        }
    }

    /// Position in the stream: PyTorch's `philox_offset`, four per call of every thread.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Moves to a position in the stream, rounded down to a multiple of four.
    pub fn set_offset(&mut self, offset: u64) {
        self.offset = offset / PER_CALL * PER_CALL;
    }

    /// `torch.randn(count, device="cuda")`: standard normal.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        self.normal(count, 0.0, 1.0)
    }

    /// `torch.empty(count, device="cuda").normal_(mean, std)`.
    pub fn normal(&mut self, count: usize, mean: f32, std: f32) -> Vec<f32> {
        self.draw(count, |words, slot| {
            let (sin, cos) = box_muller(words[slot & 2], words[slot & 2 | 1]);
            (if slot & 1 == 0 { sin } else { cos }) * std + mean
        })
    }

    /// `torch.rand(count, device="cuda")`: uniform in `[0, 1)`.
    pub fn rand(&mut self, count: usize) -> Vec<f32> {
        self.draw(count, |words, slot| {
            // curand gives (0, 1]; PyTorch sends 1 to 0.
            let uniform = unit(words[slot]);
            if uniform == 1.0 { 0.0 } else { uniform }
        })
    }

    fn draw(&mut self, count: usize, value: impl Fn([u32; 4], usize) -> f32) -> Vec<f32> {
        if count == 0 {
            return Vec::new();
        }
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let threads = self.device.threads(count as u64);
        let first = self.offset / PER_CALL;
        let values = (0..count as u64)
            .map(|i| {
                let (call, slot) = (i / threads / PER_CALL, (i / threads % PER_CALL) as usize);
                let (position, thread) = (first.wrapping_add(call), i % threads);
                let counter = [
                    position as u32,
                    (position >> 32) as u32,
                    thread as u32,
                    (thread >> 32) as u32,
                ];
                value(philox4x32_10(counter, key), slot)
            })
            .collect();
        let calls = (count as u64).div_ceil(threads * PER_CALL);
        self.offset = self.offset.wrapping_add(calls * PER_CALL);
        values
    }
}

/// A word as a uniform in `(0, 1]`.
fn unit(word: u32) -> f32 {
    const SCALE: f32 = 1.0 / (1u64 << 32) as f32;
    (word as f32).mul_add(SCALE, SCALE / 2.0)
}

/// Two normals, `(radius * sin, radius * cos)`.
fn box_muller(x: u32, y: u32) -> (f32, f32) {
    const TURN: f32 = std::f32::consts::TAU / (1u64 << 32) as f32;
    let angle = (y as f32).mul_add(TURN, TURN / 2.0);
    let radius = (-2.0 * f64::from(unit(x)).ln() as f32).sqrt();
    let (sin, cos) = f64::from(angle).sin_cos();
    (radius * sin as f32, radius * cos as f32)
}

/// Philox4x32-10 (Salmon et al., SC 2011): four random words from a counter and a key.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key[0] = key[0].wrapping_add(0x9e37_79b9);
        key[1] = key[1].wrapping_add(0xbb67_ae85);
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        for (counter, key, expected) in [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn seed_zero_gives_the_normals_published_for_torch_cuda() {
        // Documented in stable-diffusion-webui:modules/rng_philox.py for seed 0.
        let published = [
            -0.92466259_f64,
            -0.42534415,
            -2.6438457,
            0.14518388,
            -0.12086647,
            -0.57972564,
            -0.62285122,
            -0.32838709,
            -1.07454231,
            -0.36314407,
            -1.67105067,
            2.26550497,
        ];
        for device in [CudaDevice::UNBOUNDED, CudaDevice::H100] {
            let drawn = CudaGenerator::on(device, 0).randn(12);
            for (drawn, published) in drawn.iter().zip(published) {
                assert!(
                    (f64::from(*drawn) - published).abs() < 2e-6,
                    "{drawn} {published}"
                );
            }
        }
    }

    #[test]
    fn a_full_device_takes_four_values_of_each_thread() {
        // One multiprocessor of 512 threads: two blocks.
        let device = CudaDevice::new(1, 512);
        let threads = 512;
        let mut small = CudaGenerator::on(device, 9);
        let drawn = small.randn(5 * threads + 3);
        // Thread 5: elements 5, 517, 1029, 1541 are the words of its first call, 2053 of its second.
        let words = philox4x32_10([0, 0, 5, 0], [9, 0]);
        let next = philox4x32_10([1, 0, 5, 0], [9, 0]);
        assert_eq!(drawn[5], box_muller(words[0], words[1]).0);
        assert_eq!(drawn[5 + threads], box_muller(words[0], words[1]).1);
        assert_eq!(drawn[5 + 2 * threads], box_muller(words[2], words[3]).0);
        assert_eq!(drawn[5 + 3 * threads], box_muller(words[2], words[3]).1);
        assert_eq!(drawn[5 + 4 * threads], box_muller(next[0], next[1]).0);
        assert_eq!(small.offset(), 8);
        // What fits the device does not depend on its size.
        assert_eq!(
            CudaGenerator::on(device, 9).randn(threads),
            CudaGenerator::new(9).randn(threads)
        );
    }

    #[test]
    fn draws_continue_at_the_offset() {
        let mut generator = CudaGenerator::new(1 << 40);
        let (first, second) = (generator.randn(10), generator.rand(10));
        assert_ne!(first, second);
        assert_eq!(generator.offset(), 8);
        generator.set_offset(4);
        assert_eq!(generator.rand(10), second);
        assert!(generator.rand(4096).iter().all(|u| (0.0..1.0).contains(u)));
        assert!(generator.rand(0).is_empty());
    }
}
