//! The paper's design choices, one left out at a time, re-measured in the miniature.
//!
//! Every arm is a short run of the same configuration, seed and budget with one part changed. Arms
//! that are done are not run again, and one that was killed goes on where it was.

use std::fmt::Write as _;
use std::path::Path;

use nitro_models::emmdit::{Adaln, EmmditConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;
use crate::config::{EmmditTask, RunConfig, TaskConfig};
use crate::emmdit::{BenchScores, EmmditTraining};
use crate::files::{write_json, write_whole};
use crate::store::ParameterStore;
use crate::trainer::{RunOptions, train};

/// Prompts of the score: the whole bench, since arms differ by little.
const SCORED: usize = 240;

/// One way to train.
#[derive(Clone, Copy, Debug)]
pub struct Arm {
    /// Name of its folder.
    pub name: &'static str,
    /// What is different.
    pub change: &'static str,
    /// What is known of the paper's own measurement.
    pub paper: &'static str,
    apply: fn(&mut EmmditTask),
}

/// All arms; the first is the complete model, which the others are compared with.
pub const ARMS: [Arm; 6] = [
    Arm {
        name: "complete",
        change: "nothing",
        paper: "the design of the paper",
        apply: |_| (),
    },
    Arm {
        name: "no-compression",
        change: "no token compression",
        paper: "compression saves 68.5 % of the tokens (blog)",
        apply: |task| task.model.token_compression = false,
    },
    Arm {
        name: "no-reinforcement",
        change: "no position reinforcement",
        paper: "FID 24.78 without, 22.42 with it (second-hand)",
        apply: |task| task.model.position_reinforcement = false,
    },
    Arm {
        name: "no-asa",
        change: "full attention instead of alternating subregions",
        paper: "ASA saves attention cost at like quality; no number at hand",
        apply: |task| task.model.use_sub_attn = false,
    },
    Arm {
        name: "adaln-single",
        change: "AdaLN-single instead of AdaLN-affine",
        paper: "affine is better; no number at hand",
        apply: |task| task.model.adaln = Adaln::Single,
    },
    Arm {
        name: "no-repa",
        change: "no REPA",
        paper: "REPA speeds up convergence; no number at hand",
        apply: |task| {
            task.repa = None;
            task.model.repa = None;
        },
    },
];

/// What an arm came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The arm's name.
    pub name: String,
    /// Flow-matching loss, the mean over the last tenth of the run.
    pub loss: f64,
    /// Share of the bench's pictures right, by the averaged weights at the end.
    pub score: f64,
    /// The same with partly right pictures counted in part: short runs differ here first.
    pub credit: f64,
    /// Parameters of the model without projectors.
    pub parameters: usize,
    /// Image tokens that the blocks of the three groups see.
    pub tokens: [usize; 3],
    /// Arithmetic of one forward pass of one sample, without projectors.
    pub gflop: f64,
    /// Milliseconds a training step, the median over the log's lines.
    pub step_ms: f64,
}

/// The configuration of `arm`: `base` with its budget and the arm's change.
pub fn configure(base: &RunConfig, arm: &Arm, steps: u64) -> Result<RunConfig, TrainError> {
    let mut config = base.clone();
    let TaskConfig::Emmdit(task) = &mut config.task else {
        return Err(TrainError::Config {
            origin: "ablations".into(),
            reason: format!("task kind is {}, expected emmdit", base.task.kind()),
        });
    };
    (arm.apply)(task);
    let run = &mut config.run;
    run.max_steps = steps;
    // A learning rate that falls to zero shows what a short run has learnt.
    run.decay_steps = steps / 4;
    run.warmup_steps = run.warmup_steps.min(steps / 10);
    run.log_every = (steps / 100).max(1);
    run.save_every = (steps / 10).max(1);
    run.keep = 1;
    run.sample_every = steps;
    run.score_every = 0; // scored at the end, see `score`
    Ok(config)
}

/// Runs `arms`, each in a folder of its own below `runs`, and writes `ablations.md` and
/// `ablations.json` there after each; returns the table.
pub fn run(
    base: &RunConfig,
    arms: &[Arm],
    steps: u64,
    runs: &Path,
    options: &RunOptions,
    mut tell: impl FnMut(&Arm),
) -> Result<String, TrainError> {
    let mut outcomes = Vec::new();
    let mut table = String::new();
    for arm in arms {
        tell(arm);
        let config = configure(base, arm, steps)?;
        let TaskConfig::Emmdit(task) = &config.task else {
            continue; // `configure` has refused it
        };
        let dir = runs.join(arm.name);
        let training = EmmditTraining::new(&config.run, task)?;
        let store = train(&training, &config, &dir, options)?;
        let scores = score(&training, &store, steps, &dir)?;
        outcomes.push(outcome(arm, &config, task, scores, &dir)?);
        table = markdown(&outcomes, &config);
        write_json(&runs.join("ablations.json"), &outcomes)?;
        write_whole(&runs.join("ablations.md"), table.as_bytes())?;
    }
    Ok(table)
}

/// The scores of the averaged weights after `steps` steps, kept in the run's folder.
fn score(
    training: &EmmditTraining<'_>,
    store: &ParameterStore,
    steps: u64,
    dir: &Path,
) -> Result<BenchScores, TrainError> {
    let path = dir.join(format!("scores-{steps:08}.json"));
    let kept = std::fs::read(&path).ok();
    if let Some(scores) = kept.and_then(|json| serde_json::from_slice(&json).ok()) {
        return Ok(scores);
    }
    let scores = training.bench_scores(&store.averaged(), SCORED)?;
    write_json(&path, &scores)?;
    Ok(scores)
}

fn outcome(
    arm: &Arm,
    config: &RunConfig,
    task: &EmmditTask,
    scores: BenchScores,
    dir: &Path,
) -> Result<Outcome, TrainError> {
    let path = dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|source| TrainError::Io {
        path: path.clone(),
        source,
    })?;
    let lines: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let numbers = |key: &str, from: u64| -> Vec<f64> {
        let late = lines
            .iter()
            .filter(|line| line["step"].as_u64() > Some(from));
        late.filter_map(|line| line[key].as_f64()).collect()
    };
    let steps = config.run.max_steps;
    let key = if task.repa.is_some() {
        "diff_loss"
    } else {
        "loss"
    };
    let late = numbers(key, steps - steps.div_ceil(10));
    let mut speeds = numbers("images_per_second", 0);
    speeds.sort_by(f64::total_cmp);
    let missing = |what: &str| TrainError::Config {
        origin: path.display().to_string(),
        reason: format!("it tells no {what} of the run's end; remove the folder to run it again"),
    };
    let speed = speeds
        .get(speeds.len() / 2)
        .ok_or_else(|| missing("speed"))?;
    let plain = EmmditConfig {
        repa: None,
        ..task.model.clone()
    };
    Ok(Outcome {
        name: arm.name.to_owned(),
        loss: match late.len() {
            0 => return Err(missing("loss")),
            n => late.iter().sum::<f64>() / n as f64,
        },
        score: scores.right,
        credit: scores.credit,
        parameters: plain
            .parameter_counts()
            .iter()
            .map(|(_, count)| count)
            .sum(),
        tokens: plain.tokens_per_group(),
        gflop: plain.gflop(task.text_tokens),
        step_ms: 1e3 * config.run.batch_size as f64 / speed,
    })
}

fn markdown(outcomes: &[Outcome], config: &RunConfig) -> String {
    let run = &config.run;
    let mut text = format!(
        "# The paper's choices, one left out at a time\n\n\
         Every arm: {} steps of {} pictures, seed {}, learning rate {}, the same data. Loss is the \
         flow-matching loss over the last tenth of the run; score is the share of pictures right on \
         {SCORED} prompts of the shapes bench (one picture each), by the averaged weights at the end; partly right \
         counts what is right in the others as well.\n\n\
         | changed | loss | score | partly right | parameters | tokens per group | GFLOP | ms a step | the paper |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        run.max_steps, run.batch_size, run.seed, run.optimizer.lr
    );
    for outcome in outcomes {
        let arm = ARMS.iter().find(|arm| arm.name == outcome.name);
        let (change, paper) = arm.map_or(("", ""), |arm| (arm.change, arm.paper));
        let [a, b, c] = outcome.tokens;
        let _ = writeln!(
            text,
            "| {change} | {:.4} | {:.3} | {:.3} | {:.2}M | {a} / {b} / {c} | {:.2} | {:.0} | {paper} |",
            outcome.loss,
            outcome.score,
            outcome.credit,
            outcome.parameters as f64 / 1e6,
            outcome.gflop,
            outcome.step_ms,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arm_is_a_model_of_its_own_and_one_change_away() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let base = RunConfig::load(&configs.join("miniature-stage1.yaml"), &[]).unwrap();
        let tasks: Vec<EmmditTask> = ARMS
            .iter()
            .map(|arm| {
                let config = configure(&base, arm, 2000).unwrap();
                assert_eq!((config.run.max_steps, config.run.decay_steps), (2000, 500));
                match config.task {
                    TaskConfig::Emmdit(task) => task,
                    other => panic!("{} became a {}", arm.name, other.kind()),
                }
            })
            .collect();
        for (arm, task) in ARMS.iter().zip(&tasks) {
            task.model.check().unwrap();
            let same = tasks
                .iter()
                .filter(|other| other.model == task.model)
                .count();
            assert_eq!(same, 1, "{} is like another arm", arm.name);
        }
        let gflop = |i: usize| tasks[i].model.gflop(tasks[i].text_tokens);
        assert!(gflop(1) > 1.5 * gflop(0), "compression saves arithmetic");
    }
}
