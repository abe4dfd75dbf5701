use super::{World, refuse};
use crate::Result;

/// The samples of an epoch, dealt out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Nodes, ranks per node, workers per rank, batches per worker, samples per batch.
    pub shape: [usize; 5],
    /// Sample numbers in row-major order of `shape`; -1 stands for no sample.
    pub ids: Vec<i64>,
}

impl Work {
    /// Puts what `by` has at each number in its place.
    pub(super) fn replace(&mut self, by: &[usize]) {
        for id in &mut self.ids {
            if let Ok(index) = usize::try_from(*id) {
                *id = by[index] as i64;
            }
        }
    }

    /// All samples of one worker, in order, without padding.
    pub fn worker(&self, node: usize, rank_of_node: usize, worker: usize) -> Vec<usize> {
        let [_, ranks, workers, batches, size] = self.shape;
        let length = batches * size;
        let begin = ((node * ranks + rank_of_node) * workers + worker) * length;
        self.ids[begin..begin + length]
            .iter()
            .filter_map(|id| usize::try_from(*id).ok())
            .collect()
    }

    /// The batches of one rank, as torch's `DataLoader` yields them: from the workers in turn, each
    /// worker's samples packed anew because padding is left out. With `drop_last` an incomplete
    /// batch at a worker's end is dropped.
    pub fn batches(&self, node: usize, rank_of_node: usize, drop_last: bool) -> Vec<Vec<usize>> {
        let [_, _, workers, _, size] = self.shape;
        let queues: Vec<Vec<Vec<usize>>> = (0..workers)
            .map(|worker| {
                let samples = self.worker(node, rank_of_node, worker);
                let batches = samples.chunks(size).map(<[usize]>::to_vec);
                batches
                    .filter(|batch| batch.len() == size || !drop_last)
                    .collect()
            })
            .collect();
        let longest = queues.iter().map(Vec::len).max().unwrap_or(0);
        let turn = |round: usize| {
            queues
                .iter()
                .filter_map(move |queue| queue.get(round).cloned())
        };
        (0..longest).flat_map(turn).collect()
    }
}

/// `get_partitions_relaxed`: deals positions `0..samples` of an epoch out to everyone, without the
/// first `drop_first` of them, which have been seen.
///
/// # Errors
/// Numbers of zero; numbers of nodes and canonical nodes of which neither divides the other, unless
/// the run began (with `initial_nodes`) on a number that fits and the global batch can be dealt anew.
pub fn partition(
    samples: usize,
    canonical_nodes: usize,
    world: World,
    batch_size: usize,
    drop_first: usize,
    initial_nodes: Option<usize>,
) -> Result<Work> {
    let world = World {
        workers_per_rank: world.workers_per_rank.max(1),
        ..world
    };
    if samples == 0 || canonical_nodes == 0 || batch_size == 0 || world.ranks() == 0 {
        return refuse(format!(
            "{samples} samples, {canonical_nodes} canonical nodes, {} nodes of {} ranks, batches of \
             {batch_size}; expected at least 1 of each",
            world.nodes, world.ranks_per_node
        ));
    }
    let fits =
        canonical_nodes.is_multiple_of(world.nodes) || world.nodes.is_multiple_of(canonical_nodes);
    let initial = match initial_nodes {
        Some(initial) if !fits => initial,
        _ => {
            return original(samples, canonical_nodes, world, batch_size, drop_first);
        }
    };
    // Deal to the nodes of the beginning, then walk through that in the order of training and deal
    // anew to those of today.
    let global = world.ranks() * batch_size;
    let devices = initial * world.ranks_per_node;
    if devices == 0 || !global.is_multiple_of(devices) {
        return refuse(format!(
            "a global batch of {global} cannot be dealt to the {devices} ranks with which the run \
             began; keep the global batch size when resuming"
        ));
    }
    let before = World {
        nodes: initial,
        ..world
    };
    let old = original(
        samples,
        canonical_nodes,
        before,
        global / devices,
        drop_first,
    )?;
    let [nodes, ranks, workers, batches, size] = old.shape;
    let mut walk = Vec::with_capacity(old.ids.len());
    for batch in 0..batches {
        for worker in 0..workers {
            for node in 0..nodes {
                for rank in 0..ranks {
                    let at = (((node * ranks + rank) * workers + worker) * batches + batch) * size;
                    walk.extend(&old.ids[at..at + size]);
                }
            }
        }
    }
    Ok(deal(&walk, world, batch_size, batches))
}

/// Ids in the order of training, `[batches][workers][nodes][ranks][size]`, to `Work`'s order.
fn deal(walk: &[i64], world: World, size: usize, batches: usize) -> Work {
    let (nodes, ranks, workers) = (world.nodes, world.ranks_per_node, world.workers_per_rank);
    let mut ids = Vec::with_capacity(walk.len());
    for node in 0..nodes {
        for rank in 0..ranks {
            for worker in 0..workers {
                for batch in 0..batches {
                    let at = (((batch * workers + worker) * nodes + node) * ranks + rank) * size;
                    ids.extend(&walk[at..at + size]);
                }
            }
        }
    }
    Work {
        shape: [nodes, ranks, workers, batches, size],
        ids,
    }
}

/// `get_partitions_orig`.
fn original(
    samples: usize,
    canonical_nodes: usize,
    world: World,
    batch_size: usize,
    drop_first: usize,
) -> Result<Work> {
    let (nodes, ranks, workers) = (world.nodes, world.ranks_per_node, world.workers_per_rank);
    if !canonical_nodes.is_multiple_of(nodes) && !nodes.is_multiple_of(canonical_nodes) {
        return refuse(format!(
            "{canonical_nodes} canonical nodes and {nodes} nodes; expected one to divide the other"
        ));
    }
    let rows = canonical_rows(samples, canonical_nodes, nodes)?;
    // Canonical nodes take turns, and so do the nodes they are dealt to.
    let length = rows.first().map_or(0, Vec::len);
    let turns: Vec<i64> = (0..length)
        .flat_map(|turn| rows.iter().map(move |row| row[turn]))
        .skip(drop_first - drop_first % nodes)
        .collect();
    let per_node = |node: usize| -> Vec<i64> {
        let mut mine: Vec<i64> = turns.iter().skip(node).step_by(nodes).copied().collect();
        pad_for_ranks(&mut mine, ranks);
        mine
    };
    let unit = workers * batch_size;
    let mut ids = Vec::new();
    let mut batches = 0;
    for node in 0..nodes {
        let mine = per_node(node);
        let per_rank = mine.len() / ranks;
        let padded = per_rank.next_multiple_of(unit);
        batches = padded / unit;
        for rank in 0..ranks {
            let id = |i: usize| {
                if i < per_rank {
                    mine[i * ranks + rank]
                } else {
                    -1
                }
            };
            for worker in 0..workers {
                for batch in 0..batches {
                    let begin = (batch * workers + worker) * batch_size;
                    ids.extend((begin..begin + batch_size).map(id));
                }
            }
        }
    }
    Ok(Work {
        shape: [nodes, ranks, workers, batches, batch_size],
        ids,
    })
}

/// The positions of each canonical node, all of one length: short ones repeat their last.
fn canonical_rows(samples: usize, canonical: usize, nodes: usize) -> Result<Vec<Vec<i64>>> {
    let length = samples.div_ceil(canonical);
    // A canonical node that several nodes share must be divisible among them.
    let ratio = if canonical < nodes {
        nodes / canonical
    } else {
        1
    };
    let padding = length.next_multiple_of(ratio) - length;
    let enough = samples > canonical || (samples == canonical && canonical >= nodes);
    if !enough {
        let width = length + padding;
        let row = |r: usize| {
            (r * width..(r + 1) * width)
                .map(|i| (i % samples) as i64)
                .collect()
        };
        return Ok((0..canonical).map(row).collect());
    }
    let row = |r: usize| {
        let (start, stop) = (r * samples / canonical, (r + 1) * samples / canonical);
        let mut row: Vec<i64> = (start..start + length).map(|i| i as i64).collect();
        if stop - start < length {
            row[length - 1] -= 1;
        }
        if padding > 0 {
            // NumPy's slice [-2 padding - ratio + 1 : -padding - ratio + 1] of the padded row,
            // whose tail still holds the numbers that would follow.
            let tail = (0..padding).map(|i| (start + length + i) as i64);
            row.extend(tail);
            let width = row.len() as isize;
            let at = |from_end: usize| (width - from_end as isize).clamp(0, width) as usize;
            let source = row[at(2 * padding + ratio - 1)..at(padding + ratio - 1)].to_vec();
            let target = &mut row[length..];
            match source.as_slice() {
                [one] => target.fill(*one),
                all if all.len() == target.len() => target.copy_from_slice(all),
                _ => {
                    return refuse(format!(
                        "{samples} samples are too few for {canonical} canonical nodes on {nodes} \
                         nodes"
                    ));
                }
            }
        }
        Ok(row)
    };
    (0..canonical).map(row).collect()
}

/// Lengthens a node's positions to a multiple of its ranks by repeating late ones.
fn pad_for_ranks(mine: &mut Vec<i64>, ranks: usize) {
    let missing = mine.len().next_multiple_of(ranks) - mine.len();
    if missing == 0 {
        return;
    }
    let length = mine.len();
    if ranks + missing - 1 <= length {
        let begin = length + 1 - ranks - missing;
        mine.extend_from_within(begin..begin + missing);
    } else {
        let all = mine.clone();
        mine.extend(all.iter().cycle().take(missing));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn world(nodes: usize, ranks: usize, workers: usize) -> World {
        World {
            nodes,
            ranks_per_node: ranks,
            workers_per_rank: workers,
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_everyone_gets_as_many(
            samples in 1usize..400,
            (canonical, nodes) in prop::sample::select(vec![(1, 1), (64, 1), (8, 2), (4, 4), (2, 4)]),
            ranks in 1usize..5,
            workers in 1usize..4,
            batch in 1usize..7,
        ) {
            let world = world(nodes, ranks, workers);
            let Ok(work) = partition(samples, canonical, world, batch, 0, None) else {
                prop_assume!(false);
                return Ok(());
            };
            prop_assert_eq!(work.ids.len(), work.shape.iter().product::<usize>());
            let seen: BTreeSet<i64> = work.ids.iter().copied().filter(|id| *id >= 0).collect();
            prop_assert_eq!(seen, (0..samples as i64).collect::<BTreeSet<_>>());
        }

        #[test]
        fn what_follows_a_resumption_is_what_would_have_followed(
            samples in 100usize..400,
            ranks in 1usize..4,
            batch in 1usize..5,
            done in 0usize..6,
        ) {
            let world = world(1, ranks, 1);
            let whole = partition(samples, 64, world, batch, 0, None).unwrap();
            let rest = partition(samples, 64, world, batch, done * batch * ranks, None).unwrap();
            for rank in 0..ranks {
                let all = whole.batches(0, rank, true);
                let after = rest.batches(0, rank, true);
                prop_assert_eq!(&all[done.min(all.len())..], &after[..]);
            }
        }
    }

    #[test]
    fn numbers_that_make_no_order_are_told() {
        assert!(partition(10, 3, world(2, 1, 1), 1, 0, None).is_err());
        assert!(partition(10, 4, world(0, 1, 1), 1, 0, None).is_err());
        assert!(partition(10, 4, world(1, 1, 1), 0, 0, None).is_err());
        assert!(partition(0, 4, world(1, 1, 1), 1, 0, None).is_err());
        // Resumed on 3 nodes a run that began on 2: the batch must stay.
        assert!(partition(100, 4, world(3, 1, 1), 2, 0, Some(2)).is_ok());
        assert!(partition(100, 4, world(3, 1, 1), 1, 0, Some(2)).is_err());
    }
}
