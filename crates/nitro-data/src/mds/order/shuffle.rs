use std::ops::Range;

use nitro_diffusion::noise::NumpyGenerator;

use super::refuse;
use crate::Result;

/// `get_shuffle_py1s`: which sample stands at each position of an epoch.
///
/// The shards are shuffled once per run (by `seed`), cut at the borders of the canonical nodes, and
/// shuffled within each per epoch (by `seed + epoch`), as are the samples within every piece.
pub fn shuffle_py1s(
    shard_sizes: &[usize],
    canonical_nodes: usize,
    seed: u64,
    epoch: u64,
) -> Result<Vec<usize>> {
    if canonical_nodes == 0 {
        return refuse("0 canonical nodes; expected at least 1");
    }
    let mut samples = 0;
    let mut spans: Vec<Range<usize>> = Vec::with_capacity(shard_sizes.len());
    for size in shard_sizes {
        spans.push(samples..samples + size);
        samples += size;
    }
    NumpyGenerator::new(seed).shuffle(&mut spans);

    let Some(epoch_seed) = seed.checked_add(epoch) else {
        return refuse(format!("seed {seed} + epoch {epoch} is too large"));
    };
    let mut rng = NumpyGenerator::new(epoch_seed);
    let mut parts = divide(spans, samples, canonical_nodes);
    // The generator serves all parts' spans first, then all samples.
    parts.iter_mut().for_each(|part| rng.shuffle(part));
    let mut ids = Vec::with_capacity(samples);
    for span in parts.into_iter().flatten() {
        let begin = ids.len();
        ids.extend(span);
        rng.shuffle(&mut ids[begin..]);
    }
    Ok(ids)
}

/// Spans dealt in order to `parts` canonical nodes of equal size, cut at their borders.
fn divide(spans: Vec<Range<usize>>, samples: usize, parts: usize) -> Vec<Vec<Range<usize>>> {
    let mut spans = spans.into_iter();
    let mut open = spans.next();
    let mut dealt = 0;
    (1..=parts)
        .map(|part| {
            let end = samples * part / parts;
            let mut mine = Vec::new();
            while let Some(span) = open.take() {
                if dealt + span.len() <= end {
                    dealt += span.len();
                    mine.push(span);
                    open = spans.next();
                    continue;
                }
                let cut = span.start + (end - dealt);
                if cut > span.start {
                    mine.push(span.start..cut);
                    dealt = end;
                }
                open = Some(cut..span.end);
                break;
            }
            mine
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_sample_comes_once(
            sizes in prop::collection::vec(0usize..20, 1..12),
            nodes in 1usize..9,
            seed: u64,
            epoch in 0u64..1000,
        ) {
            let seed = seed >> 1;
            let mut ids = shuffle_py1s(&sizes, nodes, seed, epoch).unwrap();
            ids.sort_unstable();
            let all: Vec<usize> = (0..sizes.iter().sum()).collect();
            prop_assert_eq!(ids, all);
        }
    }
}
