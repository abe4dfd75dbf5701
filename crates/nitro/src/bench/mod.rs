//! Measuring a machine and the models on it: what `nitro bench` runs.
//!
//! The machine's peaks come first, then stages of full-size models whose weights follow from a
//! formula, so nothing is downloaded. A [`Suite`] says which models those are (smaller ones in
//! tests), a [`Stage`] what of them is run.

mod loading;
mod machine;
mod measure;
mod models;
mod peaks;
mod report;
mod stage;
mod suite;
mod training;

use std::ops::ControlFlow;
use std::time::Duration;

use nitro_models::{InputError, WeightError};
use nitro_ops::{Precision, profile};
use nitro_train::TrainError;

pub use machine::Machine;
pub use peaks::{MemoryPeak, Peaks, Rate};
pub use report::{LoadReport, OpReport, Report, StageReport, TableRow, Throughput};
pub use stage::{Stage, UnknownStage};
pub use suite::{Suite, TrainingStep};

use loading::Shards;
use measure::measure;
use models::Models;
use training::TrainingRun;

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    /// The stages, each run in every precision.
    pub stages: Vec<Stage>,
    /// How products are computed.
    pub precisions: Vec<Precision>,
    /// Timed runs of a stage, of which the median counts.
    pub runs: usize,
    /// Runs before those.
    pub warmup: usize,
    /// No further run is begun after this time, once there were three.
    pub budget: Duration,
    /// Whether one more run of each stage tells how long each operation took.
    pub per_op: bool,
    /// Whether models are as a second start makes them, over packed weights that a first one kept.
    pub second_start: bool,
}

impl Default for Options {
    /// All stages in f32; five runs or ten seconds after one to warm up.
    fn default() -> Self {
        Self {
            stages: Stage::ALL.to_vec(),
            precisions: vec![Precision::F32],
            runs: 5,
            warmup: 1,
            budget: Duration::from_secs(10),
            per_op: false,
            second_start: false,
        }
    }
}

/// What an observer of a bench hears; it answers whether to go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The machine's peaks are being measured.
    Peaks,
    /// They are known.
    PeaksDone(&'a Machine, &'a Peaks),
    /// A model is being made.
    Loading(&'static str),
    /// A stage is about to run for the `done + 1`-th time, of `total` at most.
    Running {
        /// Which.
        stage: Stage,
        /// How.
        precision: Precision,
        /// Runs made, those to warm up included.
        done: usize,
        /// Runs to be made at most.
        total: usize,
    },
    /// A stage was measured.
    Done(&'a StageReport),
    /// A stage does not exist in this precision.
    Skipped {
        /// Which.
        stage: Stage,
        /// How it would have been run.
        precision: Precision,
        /// Why.
        reason: &'static str,
    },
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The observer asked to stop.
    #[error("the bench was stopped")]
    Cancelled,
    /// A model cannot be made.
    #[error(transparent)]
    Model(#[from] WeightError),
    /// A model refused its input.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A picture could not be encoded or decoded.
    #[error("the picture that is prepared: {0}")]
    Picture(String),
    /// Shards could not be written.
    #[error("the shards that are read: {0}")]
    Shards(#[from] nitro_data::DataError),
    /// Sampling failed.
    #[error("sampling failed: {0}")]
    Sampling(String),
    /// The training step failed.
    #[error(transparent)]
    Train(#[from] TrainError),
}

/// Hears what happens, and answers whether to go on.
pub type Observer<'a> = &'a mut dyn FnMut(&Event<'_>) -> ControlFlow<()>;

/// Measures the peaks of the machine, then the stages of `suite` that `options` name, on the thread
/// pool the caller runs in.
pub fn run(suite: &Suite, options: &Options, observer: Observer<'_>) -> Result<Report, BenchError> {
    tell(observer, &Event::Peaks)?;
    let bare_memory = machine::resident_memory();
    let machine = Machine::this();
    let peaks = Peaks::measure();
    tell(observer, &Event::PeaksDone(&machine, &peaks))?;
    let (mut stages, mut loads) = (Vec::new(), Vec::new());
    for &precision in &options.precisions {
        let mut models = Models::new(suite, precision, bare_memory, options.second_start)?;
        for &stage in &options.stages {
            if let Some(reason) = stage.refusal(precision) {
                let event = Event::Skipped {
                    stage,
                    precision,
                    reason,
                };
                tell(observer, &event)?;
                continue;
            }
            let report = run_stage(&mut models, stage, options, &peaks, observer)?;
            tell(observer, &Event::Done(&report))?;
            stages.push(report);
        }
        loads.extend(models.into_loads());
    }
    Ok(Report::new(suite, machine, peaks, stages, loads))
}

fn run_stage(
    models: &mut Models<'_>,
    stage: Stage,
    options: &Options,
    peaks: &Peaks,
    observer: Observer<'_>,
) -> Result<StageReport, BenchError> {
    let (suite, precision) = (models.suite(), models.precision());
    models.prepare(stage, observer)?;
    let (mut training, shards, mut reader);
    let mut work: Box<dyn FnMut() -> Result<(), BenchError> + '_> = match stage {
        Stage::TrainStep => {
            training = TrainingRun::new(&suite.training, precision)?;
            Box::new(|| training.step())
        }
        Stage::Load => {
            shards = Shards::write(suite)?;
            reader = shards.reader()?;
            Box::new(|| reader.next())
        }
        _ => models.work(stage)?,
    };
    machine::reset_peak_memory();
    let timing = measure(options, &mut work, &mut |done, total| {
        let event = Event::Running {
            stage,
            precision,
            done,
            total,
        };
        tell(observer, &event)
    })?;
    let peak_memory = machine::peak_memory();
    let per_op = match options.per_op {
        false => None,
        true => {
            profile::start();
            let begun = std::time::Instant::now();
            let result = work();
            let whole = begun.elapsed();
            let times = profile::stop();
            result?;
            Some(OpReport::list(&times, whole))
        }
    };
    Ok(StageReport::new(
        suite,
        stage,
        precision,
        &timing,
        peaks,
        peak_memory,
        per_op,
    ))
}

fn tell(observer: Observer<'_>, event: &Event<'_>) -> Result<(), BenchError> {
    match observer(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(BenchError::Cancelled),
    }
}
