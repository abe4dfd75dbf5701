//! Random numbers that repeat those of PyTorch and NumPy, seed by seed.
//!
//! A picture is named by its seed: users expect the seed they know from another tool to give the
//! same starting noise here. [`CpuGenerator`] repeats `torch.Generator("cpu")`, [`CudaGenerator`]
//! repeats `torch.Generator("cuda")` without a GPU, and [`NumpyGenerator`] repeats
//! `numpy.random.default_rng`, which orders datasets. [`replay`] runs recorded calls of either.

mod cpu;
mod mt19937;
mod numpy;
mod philox;
pub mod replay;

pub use cpu::CpuGenerator;
pub use numpy::NumpyGenerator;
pub use philox::{CudaDevice, CudaGenerator, philox4x32_10};

/// Which tool's noise a seed stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoiseKind {
    /// `torch.randn(generator=torch.Generator("cpu"))`: the same on every machine.
    #[default]
    TorchCpu,
    /// `torch.randn(device="cuda")` on the given device.
    TorchCuda(CudaDevice),
}

impl NoiseKind {
    /// What pictures and reports call it: `cpu` or `cuda`, the device of torch's generator.
    pub fn name(self) -> &'static str {
        match self {
            Self::TorchCpu => "cpu",
            Self::TorchCuda(_) => "cuda",
        }
    }

    /// Standard normal starting latents, one seed per sample: `seeds.len() * per_sample` values.
    ///
    /// This is diffusers' list-of-generators form: sample `i` depends on its own seed only, so it is
    /// the same whatever batch it is made in.
    pub fn per_sample(self, seeds: &[u64], per_sample: usize) -> Vec<f32> {
        seeds
            .iter()
            .flat_map(|&seed| self.shared(seed, per_sample))
            .collect()
    }

    /// Standard normal latents drawn for a whole batch by one generator: `count` values.
    ///
    /// Sample `i > 0` of a batch made this way differs from a batch of one with any seed.
    pub fn shared(self, seed: u64, count: usize) -> Vec<f32> {
        match self {
            Self::TorchCpu => CpuGenerator::new(seed).randn(count),
            Self::TorchCuda(device) => CudaGenerator::on(device, seed).randn(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_keeps_its_noise_in_any_batch() {
        for kind in [
            NoiseKind::TorchCpu,
            NoiseKind::TorchCuda(CudaDevice::UNBOUNDED),
        ] {
            let batch = kind.per_sample(&[3, 7, 3], 40);
            assert_eq!(batch[..40], kind.shared(3, 40)[..]);
            assert_eq!(batch[40..80], kind.shared(7, 40)[..]);
            assert_eq!(batch[80..], batch[..40]);
        }
    }
}
