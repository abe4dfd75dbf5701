use std::collections::HashMap;
use std::fmt;

use serde::Serialize;

use super::ImageResult;

/// The score of one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TaskScore {
    /// GenEval's tag.
    pub tag: String,
    /// Correct pictures.
    pub correct: usize,
    /// All pictures.
    pub total: usize,
}

impl TaskScore {
    /// Share of correct pictures.
    pub fn share(&self) -> f64 {
        share(self.correct, self.total)
    }
}

/// What `summary_scores.py` says about a results file. Its [`Display`](fmt::Display) is that
/// script's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Pictures judged.
    pub images: usize,
    /// Pictures found correct.
    pub correct_images: usize,
    /// Prompts (different metadata strings).
    pub prompts: usize,
    /// Prompts with at least one correct picture.
    pub correct_prompts: usize,
    /// Scores by task, in the order of first appearance.
    pub tasks: Vec<TaskScore>,
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

impl Summary {
    /// Counts the records.
    pub fn of(records: &[ImageResult]) -> Summary {
        let mut tasks: Vec<TaskScore> = Vec::new();
        let mut prompts: HashMap<&str, bool> = HashMap::new();
        for record in records {
            let task = match tasks.iter().position(|t| t.tag == record.tag) {
                Some(i) => &mut tasks[i],
                None => {
                    tasks.push(TaskScore {
                        tag: record.tag.clone(),
                        correct: 0,
                        total: 0,
                    });
                    let last = tasks.len() - 1;
                    &mut tasks[last]
                }
            };
            task.total += 1;
            task.correct += usize::from(record.correct);
            *prompts.entry(&record.metadata).or_default() |= record.correct;
        }
        Summary {
            images: records.len(),
            correct_images: records.iter().filter(|r| r.correct).count(),
            prompts: prompts.len(),
            correct_prompts: prompts.values().filter(|&&any| any).count(),
            tasks,
        }
    }

    /// The mean of the tasks' shares: GenEval's score. Zero without any record.
    pub fn overall(&self) -> f64 {
        self.tasks.iter().map(TaskScore::share).sum::<f64>() / self.tasks.len().max(1) as f64
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part, whole| 100.0 * share(part, whole);
        writeln!(f, "Summary\n=======")?;
        writeln!(f, "Total images: {}", self.images)?;
        writeln!(f, "Total prompts: {}", self.prompts)?;
        writeln!(
            f,
            "% correct images: {:.2}%",
            percent(self.correct_images, self.images)
        )?;
        writeln!(
            f,
            "% correct prompts: {:.2}%",
            percent(self.correct_prompts, self.prompts)
        )?;
        writeln!(f, "\nTask breakdown\n==============")?;
        for t in &self.tasks {
            let (share, correct, total) = (100.0 * t.share(), t.correct, t.total);
            writeln!(f, "{:<16} = {share:.2}% ({correct} / {total})", t.tag)?;
        }
        write!(
            f,
            "\nOverall score (avg. over tasks): {:.5}",
            self.overall()
        )
    }
}
