//! Seeds of examples and noise, as functions of the run's seed and the step.

use nitro_diffusion::noise::CpuGenerator;

/// SplitMix64's finaliser: neighbouring inputs give unrelated outputs.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The seed of example `index` of `step`.
pub(crate) fn example_seed(seed: u64, step: u64, index: usize) -> u64 {
    let place = (step << 20) | index as u64;
    // The upper half is left to held-out examples.
    mix(mix(seed).wrapping_add(place.wrapping_mul(0x9E37_79B9_7F4A_7C15))) >> 1
}

/// Examples from here on are seen by no training step; they serve samples and measurements.
pub(crate) const HELD_OUT: u64 = u64::MAX / 2;

/// The generator of noise, timestep and dropout of example `index` of `step`.
///
/// A torch-compatible generator keeps the low 32 bits of its seed only.
pub(crate) fn noise_generator(seed: u64, step: u64, index: usize) -> CpuGenerator {
    CpuGenerator::new(example_seed(seed ^ 0x6E_6F69_7365, step, index) & 0xFFFF_FFFF)
}

/// The generator of what all examples of `step` share.
pub(crate) fn step_generator(seed: u64, step: u64) -> CpuGenerator {
    CpuGenerator::new(mix(mix(seed ^ 0x6E_6F69_7365).wrapping_add(step)) & 0xFFFF_FFFF)
}

/// Which of `count` examples has place `place` of a run: epochs, each in its own order.
pub(crate) fn shuffled(seed: u64, place: u64, count: usize) -> usize {
    let count = count.max(1) as u64;
    let (epoch, at) = (place / count, place % count);
    // A stride without common factor visits each example once an epoch.
    let mut stride = (example_seed(seed, epoch, 0) % count) | 1;
    while gcd(stride, count) != 1 {
        stride = (stride + 2) % count;
    }
    let offset = example_seed(seed, epoch, 1) % count;
    ((u128::from(at) * u128::from(stride) + u128::from(offset)) % u128::from(count)) as usize
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_example_once() {
        for count in [1, 2, 7, 24, 1000] {
            for epoch in 0..3 {
                let places = epoch * count as u64..(epoch + 1) * count as u64;
                let seen: HashSet<usize> = places.map(|p| shuffled(5, p, count)).collect();
                assert_eq!(seen.len(), count);
            }
        }
    }
    use std::collections::HashSet;

    #[test]
    fn seeds_do_not_repeat_within_a_run() {
        let seeds: HashSet<u64> = (0..200)
            .flat_map(|step| (0..64).map(move |i| example_seed(0, step, i)))
            .collect();
        assert_eq!(seeds.len(), 200 * 64);
        assert_ne!(example_seed(0, 0, 0), example_seed(1, 0, 0));
    }
}
