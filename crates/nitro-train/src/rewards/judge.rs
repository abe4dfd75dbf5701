//! GenEval's rules with the exact judge of the shapes world as detector.

use nitro_data::shapes::{Detection, judge};
use nitro_eval::geneval::{Clause, relations};
use nitro_eval::shapes::{options, score_with};
use rayon::prelude::*;

use super::{Sample, Scorer};

/// 1 for a picture that shows what its prompt asks, 0 for one that does not, and in between for
/// being partly right if that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct JudgeScorer {
    /// Share of the score given for being partly right.
    pub partial: f64,
}

impl Scorer for JudgeScorer {
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
        let one = |sample: &Sample<'_>| match is_right(sample)? {
            true => Ok(1.0),
            false if self.partial == 0.0 => Ok(0.0),
            false => Ok(self.partial * credit(sample)?),
        };
        samples.par_iter().map(one).collect()
    }
}

/// Whether a picture shows what its prompt asks.
pub(crate) fn is_right(sample: &Sample<'_>) -> Result<bool, String> {
    let verdict = score_with(sample.metadata, "sample", pixels(sample), &options());
    Ok(verdict.map_err(|error| error.to_string())?.correct)
}

/// How far a picture that is not right shows what its prompt asks, 0 to 1.
pub(crate) fn credit(sample: &Sample<'_>) -> Result<f64, String> {
    let (rgb, width, height) = pixels(sample);
    let found = judge(rgb, width, height).map_err(|error| error.to_string())?;
    Ok(partial_credit(&sample.metadata.include, &found))
}

fn pixels<'a>(sample: &Sample<'a>) -> (&'a [u8], usize, usize) {
    let (width, height) = sample.picture.dimensions();
    (sample.picture.as_raw(), width as usize, height as usize)
}

/// How far a picture is right, 0 to 1: the mean over clauses of how near the count is (as
/// flow_grpo's reward server, `1 - |wanted - found| / wanted`), times the share of the right colour,
/// times a half for standing in the wrong place.
fn partial_credit(clauses: &[Clause], found: &[Detection]) -> f64 {
    let of = |class: &str| -> Vec<&Detection> {
        let mut of: Vec<_> = found.iter().filter(|d| d.class.name() == class).collect();
        of.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
        of
    };
    let credit = |clause: &Clause| {
        let seen = of(&clause.class);
        let wanted = clause.count.max(1) as f64;
        let mut credit = (1.0 - (wanted - seen.len() as f64).abs() / wanted).max(0.0);
        if let Some(colour) = &clause.color {
            let right = seen.iter().filter(|d| d.colour.name() == colour).count();
            // The right thing in the wrong colour is still the right thing.
            credit *= 0.4 + 0.6 * (right as f64 / wanted).min(1.0);
        }
        if let Some((relation, target)) = &clause.position {
            let target = clauses
                .get(*target)
                .map(|c| of(&c.class))
                .unwrap_or_default();
            let placed = seen.iter().zip(&target).next().is_some_and(|(a, b)| {
                let scored = |d: &Detection| {
                    let [x0, y0, x1, y1] = d.bbox;
                    [x0, y0, x1, y1, d.confidence]
                };
                relations(&scored(a), &scored(b), options().position_threshold)
                    .contains(&relation.as_str())
            });
            credit *= if placed { 1.0 } else { 0.5 };
        }
        credit
    };
    clauses.iter().map(credit).sum::<f64>() / clauses.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;
    use nitro_data::shapes::{Example, Task, render};
    use nitro_eval::shapes::metadata_of;

    #[test]
    fn right_pictures_are_worth_more_than_half_right_ones_and_those_more_than_wrong_ones() {
        let example = (0..)
            .map(Example::from_seed)
            .find(|e| e.task == Task::TwoObject)
            .unwrap();
        let picture = RgbImage::from_raw(128, 128, render(&example.scene, 128)).unwrap();
        let metadata = |caption: &str| metadata_of(caption, Task::TwoObject).unwrap();
        let [first, second] = &metadata(&example.caption).include[..] else {
            panic!("two clauses: {}", example.caption)
        };
        let other = ["circle", "square", "star"]
            .into_iter()
            .find(|c| [&first.class, &second.class].iter().all(|k| *k != c))
            .unwrap();
        let right = metadata(&example.caption);
        let half = metadata(&format!("a {} and a {other}", first.class));
        let mut wrong = metadata(&format!("a {other} and a {}", second.class));
        wrong.include.truncate(1);
        let score = |partial: f64| {
            let samples = [&right, &half, &wrong].map(|metadata| Sample {
                metadata,
                picture: &picture,
            });
            JudgeScorer { partial }.score(&samples).unwrap()
        };
        assert_eq!(score(0.0), [1.0, 0.0, 0.0]);
        assert_eq!(score(0.6), [1.0, 0.3, 0.0]);
    }
}
