//! A fresh initialisation, and the counter-based generator behind it.

use burn::tensor::{Device, Tensor, TensorData};

use crate::{Init, ParameterSource, ParameterSpec, WeightError};

/// Draws each parameter's [`Init`] from a seed and the parameter's name, so that the values depend
/// neither on the order in which a model asks nor on its other parameters.
#[derive(Clone, Copy, Debug)]
pub struct RandomInit {
    seed: u64,
}

impl RandomInit {
    /// The initialisation of this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl ParameterSource for RandomInit {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let stream = mix(self.seed ^ fnv1a64(spec.name.as_bytes()));
        let count = spec.numel();
        let values: Vec<f32> = match spec.init {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Constant(value) => vec![value as f32; count],
            Init::Uniform(bound) => (0..count as u64)
                .map(|i| ((2.0 * unit(draw(stream, i)) - 1.0) * bound) as f32)
                .collect(),
            Init::Normal(deviation) => (0..count as u64)
                .map(|i| {
                    // Box-Muller; one minus keeps the logarithm's argument above zero.
                    let radius = (-2.0 * (1.0 - unit(draw(stream, 2 * i))).ln()).sqrt();
                    let angle = std::f64::consts::TAU * unit(draw(stream, 2 * i + 1));
                    (radius * angle.cos() * deviation) as f32
                })
                .collect(),
        };
        Ok(Tensor::from_data(TensorData::new(values, [count]), device))
    }

    fn contains(&self, _: &str) -> bool {
        false
    }
}

/// The 64-bit FNV-1a hash.
pub(crate) fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Element `index` of the SplitMix64 sequence that starts at `stream`.
pub(crate) fn draw(stream: u64, index: u64) -> u64 {
    mix(stream.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// SplitMix64's output function.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in `0..1`, of 53 bits.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u64, name: &str, init: Init, count: usize) -> Vec<f32> {
        let spec = ParameterSpec {
            name: name.to_owned(),
            shape: vec![count],
            init,
            trainable: true,
        };
        let tensor = RandomInit::new(seed)
            .parameter(&spec, &Device::flex())
            .unwrap();
        tensor.into_data().try_into_vec().unwrap()
    }

    #[test]
    fn values_depend_on_seed_and_name_only() {
        let init = Init::Normal(1.0);
        assert_eq!(values(7, "a", init, 8), values(7, "a", init, 8));
        assert_ne!(values(7, "a", init, 8), values(7, "b", init, 8));
        assert_ne!(values(7, "a", init, 8), values(8, "a", init, 8));
    }

    #[test]
    fn distributions_have_the_spread_they_are_asked_for() {
        let deviation = |x: &[f32]| (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
        let normal = values(0, "n", Init::Normal(0.5), 20_000);
        assert!((deviation(&normal) - 0.5).abs() < 0.01);
        let uniform = values(0, "u", Init::Uniform(0.3), 20_000);
        assert!(uniform.iter().all(|x| x.abs() <= 0.3));
        assert!((deviation(&uniform) - 0.3 / 3f32.sqrt()).abs() < 0.005);
        assert!(values(0, "z", Init::Zeros, 3).iter().all(|&x| x == 0.0));
        assert!(values(0, "o", Init::Ones, 3).iter().all(|&x| x == 1.0));
    }

    #[test]
    fn splitmix_gives_its_published_sequence() {
        // The first outputs of SplitMix64 seeded with 1234567.
        assert_eq!(draw(1_234_567, 0), 6_457_827_717_110_365_317);
        assert_eq!(draw(1_234_567, 1), 3_203_168_211_198_807_973);
    }
}
