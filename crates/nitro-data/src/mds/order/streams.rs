//! Weights of streams: how often an epoch takes the samples of each dataset folder.
//!
//! An epoch of weighted streams has samples that come several times, or not at all. It is laid out in
//! two steps, as mosaicml-streaming does: [`Streams::choose`] says how many samples of each stream an
//! epoch has (`Stream.apply_weights`), [`Streams::resample`] which ones (`get_sampling`,
//! `StreamingDataset.resample_streams`). Shuffle and partition then work on the places of that epoch.

use nitro_diffusion::noise::NumpyGenerator;
use serde::{Deserialize, Serialize};

use super::refuse;
use crate::{DataError, Result};

/// How often an epoch takes the samples of a stream. `proportion` is relative to the other streams,
/// which then need one too; the others are absolute.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// This share of the epoch, after all shares were scaled to one.
    Proportion(f64),
    /// Every sample so many times; a fraction takes some of them once more.
    Repeat(f64),
    /// This many samples.
    Choose(usize),
}

/// Which samples of a stream are taken where not all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Others in every epoch.
    #[default]
    Balanced,
    /// The same in every epoch.
    Fixed,
}

/// How streams make up an epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct Streams {
    /// The weight of each stream; one without has each of its samples once. Empty for none at all.
    pub weights: Vec<Option<Weight>>,
    /// Samples of an epoch, for streams that are weighted relatively or not at all.
    pub epoch_size: Option<usize>,
    /// Which samples of a stream are taken where not all are.
    pub sampling: Sampling,
    /// Samples taken together from one shard (`sampling_granularity`).
    pub granularity: usize,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            weights: Vec::new(),
            epoch_size: None,
            sampling: Sampling::Balanced,
            granularity: 1,
        }
    }
}

/// An epoch of resampled streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Epoch {
    /// Runs of places that are shuffled together: a shard, each of its repeats, the rest.
    pub(super) units: Vec<usize>,
    /// The sample at each place before the shuffle; `None` if that is its number.
    pub(super) samples: Option<Vec<usize>>,
}

impl Streams {
    /// Whether every sample comes once in an epoch.
    pub fn is_plain(&self) -> bool {
        self.epoch_size.is_none() && self.weights.iter().all(Option::is_none)
    }

    /// Samples that an epoch takes of each stream, of which there are `samples`. `seed` says which
    /// streams get what is left over by rounding.
    ///
    /// # Errors
    /// Weights that go together with no meaning: not one for each stream, relative ones beside
    /// absolute ones, negative ones, none above 0.
    pub fn choose(&self, samples: &[usize], seed: u64) -> Result<Vec<usize>> {
        let weights = match self.weights.as_slice() {
            [] => vec![None; samples.len()],
            given if given.len() == samples.len() => given.to_vec(),
            given => {
                return refuse(format!(
                    "{} weights for {} streams; expected one for each",
                    given.len(),
                    samples.len()
                ));
            }
        };
        let proportions: Vec<f64> = weights
            .iter()
            .filter_map(|weight| match weight {
                Some(Weight::Proportion(share)) => Some(*share),
                _ => None,
            })
            .collect();
        if !proportions.is_empty() && proportions.len() < weights.len() {
            return refuse(
                "some streams have a proportion and others none; give all of them one, or use \
                 repeat and choose",
            );
        }
        let bad = |number: f64| !number.is_finite() || number < 0.0;
        let given = weights.iter().filter_map(|weight| match weight {
            Some(Weight::Proportion(number) | Weight::Repeat(number)) => Some(*number),
            _ => None,
        });
        if let Some(number) = given.into_iter().find(|number| bad(*number)) {
            return refuse(format!("a weight of {number}; expected 0 or more"));
        }
        let relative = match (proportions.is_empty(), self.epoch_size) {
            (false, _) => Some(proportions),
            (true, Some(_)) if weights.iter().all(Option::is_none) => {
                Some(samples.iter().map(|count| *count as f64).collect())
            }
            (true, Some(_)) => {
                return refuse("epoch_size with repeat or choose; it goes with proportions only");
            }
            (true, None) => None,
        };
        let chosen = match relative {
            Some(shares) => {
                let total = self.epoch_size.unwrap_or_else(|| samples.iter().sum());
                deal(total, &shares, seed)?
            }
            None => {
                let one = |(count, weight): (&usize, &Option<Weight>)| match weight {
                    Some(Weight::Repeat(times)) => (times * *count as f64) as usize,
                    Some(Weight::Choose(number)) => *number,
                    _ => *count,
                };
                samples.iter().zip(&weights).map(one).collect()
            }
        };
        if chosen.iter().all(|count| *count == 0) {
            return refuse("the weights leave no sample; expected one above 0");
        }
        for (stream, (count, chosen)) in samples.iter().zip(&chosen).enumerate() {
            if *count == 0 && *chosen > 0 {
                return refuse(format!(
                    "{chosen} samples of stream {stream}, which has none"
                ));
            }
        }
        Ok(chosen)
    }

    /// The samples of `epoch`, before they are shuffled.
    pub(super) fn resample(
        &self,
        shard_sizes: &[&[usize]],
        chosen: &[usize],
        seed: u64,
        epoch: u64,
        shuffle: bool,
    ) -> Result<Epoch> {
        if self.is_plain() {
            let sizes = shard_sizes.iter().flat_map(|sizes| sizes.iter());
            return Ok(Epoch {
                units: sizes.copied().filter(|size| *size > 0).collect(),
                samples: None,
            });
        }
        if self.granularity == 0 {
            return refuse("a sampling granularity of 0; expected at least 1");
        }
        let Some(epoch_seed) = seed.checked_add(epoch) else {
            return refuse(format!("seed {seed} + epoch {epoch} is too large"));
        };
        let balanced = self.sampling == Sampling::Balanced;
        let mut rng = NumpyGenerator::new(if balanced { epoch_seed } else { seed });
        // Which shards give more is drawn anew for an epoch only if its order is.
        let shard_seed = if balanced && shuffle {
            epoch_seed
        } else {
            seed
        };
        let (mut units, mut samples) = (Vec::new(), Vec::new());
        let mut first = 0;
        for (sizes, chosen) in shard_sizes.iter().zip(chosen) {
            let counts = self.per_shard(sizes, *chosen, shard_seed);
            for (size, count) in sizes.iter().zip(counts) {
                if *size > 0 {
                    let (times, rest) = (count / size, count % size);
                    units.extend(std::iter::repeat_n(*size, times));
                    for _ in 0..times {
                        samples.extend(first..first + size);
                    }
                    if rest > 0 {
                        units.push(rest);
                        let some = rng.choice(*size, rest).map_err(draw)?;
                        let mut some: Vec<usize> =
                            some.into_iter().map(|i| first + i as usize).collect();
                        some.sort_unstable();
                        samples.extend(some);
                    }
                }
                first += size;
            }
        }
        Ok(Epoch {
            units,
            samples: Some(samples),
        })
    }

    /// How many samples each shard of a stream gives: whole rounds of all, and for the rest granules of
    /// the shards in random order (`get_sampling`).
    fn per_shard(&self, sizes: &[usize], chosen: usize, seed: u64) -> Vec<usize> {
        let total: usize = sizes.iter().sum();
        if total == 0 {
            return vec![0; sizes.len()];
        }
        let mut counts: Vec<usize> = sizes.iter().map(|size| size * (chosen / total)).collect();
        let mut rest = chosen % total;
        if rest == 0 {
            return counts;
        }
        // (shard, samples) of each granule.
        let mut granules = Vec::new();
        for (shard, size) in sizes.iter().enumerate() {
            for begin in (0..*size).step_by(self.granularity) {
                granules.push((shard, self.granularity.min(size - begin)));
            }
        }
        for granule in NumpyGenerator::new(seed).permutation(granules.len()) {
            let (shard, size) = granules[granule as usize];
            let taken = size.min(rest);
            counts[shard] += taken;
            rest -= taken;
            if rest == 0 {
                break;
            }
        }
        counts
    }
}

/// `total` dealt out by `shares`; what rounding down leaves over goes, one each, to random streams.
fn deal(total: usize, shares: &[f64], seed: u64) -> Result<Vec<usize>> {
    let sum = numpy_sum(shares);
    if sum <= 0.0 {
        return refuse("the weights leave no sample; expected one above 0");
    }
    let part = |share: &f64| (total as f64 * (share / sum)) as usize;
    let mut chosen: Vec<usize> = shares.iter().map(part).collect();
    let left = total.saturating_sub(chosen.iter().sum());
    let lucky = NumpyGenerator::new(seed).choice(shares.len(), left);
    for stream in lucky.map_err(draw)? {
        chosen[stream as usize] += 1;
    }
    Ok(chosen)
}

/// NumPy's sum of up to 128 doubles: eight running sums, then the rest.
fn numpy_sum(values: &[f64]) -> f64 {
    if values.len() < 8 {
        return values.iter().sum();
    }
    if values.len() > 128 {
        let half = values.len() / 2;
        let half = half - half % 8;
        return numpy_sum(&values[..half]) + numpy_sum(&values[half..]);
    }
    let (eights, rest) = values.as_chunks::<8>();
    let mut r = eights[0];
    for eight in &eights[1..] {
        for (sum, value) in r.iter_mut().zip(eight) {
            *sum += value;
        }
    }
    let sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    rest.iter().fold(sum, |sum, value| sum + value)
}

fn draw(error: nitro_diffusion::Error) -> DataError {
    DataError::Order(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(weights: &[Option<Weight>], epoch_size: Option<usize>) -> Streams {
        Streams {
            weights: weights.to_vec(),
            epoch_size,
            ..Streams::default()
        }
    }

    #[test]
    fn weights_say_how_many_samples_a_stream_gives() {
        use Weight::{Choose, Proportion, Repeat};
        let choose = |weights: &[Option<Weight>], size| streams(weights, size).choose(&[80, 48], 3);
        assert_eq!(choose(&[], None).unwrap(), [80, 48]);
        let absolute = [Some(Repeat(1.5)), Some(Choose(7))];
        assert_eq!(choose(&absolute, None).unwrap(), [120, 7]);
        assert_eq!(choose(&[None, Some(Repeat(0.0))], None).unwrap(), [80, 0]);
        let relative = [Some(Proportion(3.0)), Some(Proportion(1.0))];
        assert_eq!(choose(&relative, None).unwrap(), [96, 32]);
        assert_eq!(choose(&relative, Some(1000)).unwrap(), [750, 250]);
        assert_eq!(
            choose(&relative, Some(1001)).unwrap().iter().sum::<usize>(),
            1001
        );
        assert_eq!(choose(&[], Some(16)).unwrap(), [10, 6]);
        for (wrong, size) in [
            (vec![Some(Proportion(1.0)), None], None),
            (vec![Some(Proportion(1.0)), Some(Repeat(1.0))], None),
            (vec![Some(Repeat(1.0)), None], Some(10)),
            (vec![Some(Repeat(-1.0)), None], None),
            (vec![Some(Repeat(f64::NAN)), None], None),
            (vec![Some(Proportion(0.0)); 2], None),
            (vec![Some(Choose(0)); 2], None),
            (vec![None], None),
        ] {
            assert!(choose(&wrong, size).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_epoch_has_what_was_chosen_and_no_sample_more_often_than_it_must() {
        let plan = streams(&[Some(Weight::Repeat(2.25)), Some(Weight::Choose(5))], None);
        let sizes: [&[usize]; 2] = [&[10, 0, 6], &[4, 9]];
        let chosen = plan.choose(&[16, 13], 1).unwrap();
        let epochs: Vec<Epoch> = (0..2)
            .map(|epoch| plan.resample(&sizes, &chosen, 1, epoch, true).unwrap())
            .collect();
        for epoch in &epochs {
            let samples = epoch.samples.as_ref().unwrap();
            assert_eq!(samples.len(), 36 + 5);
            assert_eq!(epoch.units.iter().sum::<usize>(), samples.len());
            let times = |sample| samples.iter().filter(|s| **s == sample).count();
            assert!((0..16).all(|sample| (2..=3).contains(&times(sample))));
            assert!((16..29).all(|sample| times(sample) <= 1));
        }
        assert_ne!(epochs[0], epochs[1]);
        let fixed = Streams {
            sampling: Sampling::Fixed,
            ..plan
        };
        let again = |epoch| fixed.resample(&sizes, &chosen, 1, epoch, true).unwrap();
        assert_eq!(again(0), again(5));
    }
}
