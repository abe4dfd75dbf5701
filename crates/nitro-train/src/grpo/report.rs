//! The best and the worst pictures of a rollout, to look at.

use std::path::Path;

use super::rollout::Rollout;
use crate::TrainError;
use crate::files::write_whole;
use crate::pictures::write_pictures;

/// Pictures in each grid.
const COUNT: usize = 8;

/// Writes `step-N-best.png` and `step-N-worst.png`, and beside them prompts and rewards in
/// `step-N.txt`, in the order of the pictures.
pub(super) fn write_extremes(rollout: &Rollout, step: u64, dir: &Path) -> Result<(), TrainError> {
    let rewards = &rollout.scores.total;
    let mut order: Vec<usize> = (0..rewards.len().min(rollout.pictures.len())).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]));
    let best: Vec<usize> = order.iter().copied().take(COUNT).collect();
    let worst: Vec<usize> = order.iter().rev().copied().take(COUNT).collect();
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let mut text = String::new();
    for (name, samples) in [("best", best), ("worst", worst)] {
        let pictures: Vec<_> = samples.iter().map(|i| &rollout.pictures[*i]).collect();
        write_pictures(
            &dir.join(format!("step-{step:08}-{name}.png")),
            &pictures,
            COUNT / 2,
        )?;
        for i in samples {
            let prompt = &rollout.prompts[i % rollout.prompts.len()].prompt;
            text += &format!("{name}\t{:.4}\t{prompt}\n", rewards[i]);
        }
    }
    write_whole(&dir.join(format!("step-{step:08}.txt")), text.as_bytes())
}
