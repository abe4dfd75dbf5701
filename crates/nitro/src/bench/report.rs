//! What a bench found, as `nitro bench --json` prints it.

use std::time::Duration;

use nitro_models::emmdit::EmmditConfig;
use nitro_ops::Precision;
use nitro_ops::profile::OpTime;
use serde::Serialize;

use super::machine::Machine;
use super::measure::Timing;
use super::peaks::Peaks;
use super::stage::Stage;
use super::suite::Suite;

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub nitro: &'static str,
    /// Where.
    pub machine: Machine,
    /// What the machine can do at most.
    pub peaks: Peaks,
    /// The stages, in the order they were run.
    pub stages: Vec<StageReport>,
    /// How long models took to load.
    pub models: Vec<LoadReport>,
    /// Pictures per second by batch size, as far as the stages that decide it were measured.
    pub images_per_second: Vec<Throughput>,
    /// The rows of the paper's second table for this machine.
    pub table2: Vec<TableRow>,
}

/// One stage in one precision.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// How products were computed.
    pub precision: &'static str,
    /// Median of the timed runs, in milliseconds.
    pub median_ms: f64,
    /// The shortest run.
    pub min_ms: f64,
    /// The longest run.
    pub max_ms: f64,
    /// Timed runs.
    pub runs: usize,
    /// Floating-point operations of one run, in 10^9, counted from the configuration; 0 where nothing
    /// is multiplied.
    pub gflop: f64,
    /// 10^9 of them per second.
    pub gflops: f64,
    /// That, in percent of the machine's peak on as many threads for this precision.
    pub percent_of_peak: Option<f64>,
    /// Pictures made, taken or trained on per second, where the stage is about pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images_per_second: Option<f64>,
    /// The most memory the program held during the runs, in MiB.
    pub peak_memory_mib: Option<u64>,
    /// Where one run's time went, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_op: Option<Vec<OpReport>>,
}

impl StageReport {
    pub(super) fn new(
        suite: &Suite,
        stage: Stage,
        precision: Precision,
        timing: &Timing,
        peaks: &Peaks,
        peak_memory_mib: Option<u64>,
        per_op: Option<Vec<OpReport>>,
    ) -> Self {
        let seconds = timing.median().as_secs_f64();
        // A configuration that a model was built from is one that can be counted.
        let gflop = stage.gflop(suite).unwrap_or_default();
        let gflops = gflop / seconds;
        Self {
            name: stage.to_string(),
            precision: precision.name(),
            median_ms: 1e3 * seconds,
            min_ms: 1e3 * timing.shortest().as_secs_f64(),
            max_ms: 1e3 * timing.longest().as_secs_f64(),
            runs: timing.runs(),
            gflop,
            gflops,
            percent_of_peak: peaks
                .of(precision)
                .filter(|_| gflop > 0.0)
                .map(|peak| 100.0 * gflops / peak),
            images_per_second: stage.pictures(suite).map(|n| n as f64 / seconds),
            peak_memory_mib,
            per_op,
        }
    }
}

/// How a model was loaded.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Which.
    pub model: &'static str,
    /// In which precision.
    pub precision: &'static str,
    /// Values of its weights.
    pub parameters: usize,
    /// Making the model of weights at hand: conversion and packing, without reading a file.
    pub load_ms: f64,
    /// The same from packed weights that were kept in a file, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<SecondStart>,
    /// Memory that it holds, in MiB.
    pub resident_mib: Option<u64>,
}

/// A start that finds packed weights in a file.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SecondStart {
    /// What the first start takes to write the file, into the system's memory.
    pub save_ms: f64,
    /// Size of the file, in MiB.
    pub file_mib: usize,
    /// Making the model of the file, which is in the system's memory.
    pub load_ms: f64,
}

/// All calls of one operation with the same shapes, within one run of a stage.
#[derive(Clone, Debug, Serialize)]
pub struct OpReport {
    /// The operation and the shapes of its first inputs.
    pub op: String,
    /// Calls.
    pub calls: u64,
    /// Time of all calls together.
    pub ms: f64,
    /// Its share of the whole run, in percent.
    pub percent: f64,
    /// GFLOP/s, where the operation counts what it computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gflops: Option<f64>,
}

/// Name of what no fused operation took.
const REST: &str = "everything else (unfused operations, copies)";

impl OpReport {
    /// The operations of a run that took `whole`, with what is left over at the end.
    pub(super) fn list(times: &[OpTime], whole: Duration) -> Vec<Self> {
        let row = |op: &str, calls, time: Duration, operations: f64| {
            let seconds = time.as_secs_f64();
            Self {
                op: op.to_owned(),
                calls,
                ms: 1e3 * seconds,
                percent: 100.0 * seconds / whole.as_secs_f64().max(1e-12),
                gflops: (operations > 0.0).then(|| operations / seconds.max(1e-12) / 1e9),
            }
        };
        let seen: Duration = times.iter().map(|time| time.time).sum();
        let mut rows: Vec<Self> = times
            .iter()
            .map(|time| row(&time.name, time.calls, time.time, time.operations))
            .collect();
        rows.push(row(REST, 0, whole.saturating_sub(seen), 0.0));
        rows
    }
}

/// Pictures per second from prompts, at one batch size.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// How products were computed.
    pub precision: &'static str,
    /// Denoising steps.
    pub steps: usize,
    /// Whether each step is guided, which doubles the transformer's batch.
    pub guided: bool,
    /// Pictures made together.
    pub batch: usize,
    /// Pictures per second: the medians of text encoder, transformer and decoder added up. The prompt
    /// is encoded once per picture, the empty negative prompt not at all.
    pub images_per_second: f64,
}

/// A row of the paper's second table.
#[derive(Clone, Debug, Serialize)]
pub struct TableRow {
    /// The model.
    pub model: &'static str,
    /// How products were computed.
    pub precision: &'static str,
    /// Denoising steps.
    pub steps: usize,
    /// Pictures per second at the batch size where they are most.
    pub images_per_second: f64,
    /// That batch size.
    pub batch: usize,
    /// Milliseconds from prompt to one picture.
    pub latency_ms: f64,
    /// Millions of parameters of the transformer.
    pub parameters_m: f64,
    /// 10^12 floating-point operations of one forward pass for one picture.
    pub tflop: f64,
}

impl Report {
    pub(super) fn new(
        suite: &Suite,
        machine: Machine,
        peaks: Peaks,
        stages: Vec<StageReport>,
        models: Vec<LoadReport>,
    ) -> Self {
        let mut precisions: Vec<&'static str> = stages.iter().map(|s| s.precision).collect();
        precisions.dedup();
        let throughputs: Vec<Throughput> = precisions
            .iter()
            .flat_map(|precision| throughputs(&stages, precision))
            .collect();
        let table2 = precisions
            .iter()
            .flat_map(|precision| {
                table_rows(&suite.emmdit, suite, &stages, &throughputs, precision)
            })
            .collect();
        Self {
            nitro: env!("CARGO_PKG_VERSION"),
            machine,
            peaks,
            stages,
            models,
            images_per_second: throughputs,
            table2,
        }
    }
}

/// The median of a stage, in seconds.
fn seconds(stages: &[StageReport], precision: &str, stage: Stage) -> Option<f64> {
    let name = stage.to_string();
    let found = stages
        .iter()
        .find(|s| s.precision == precision && s.name == name)?;
    Some(found.median_ms / 1e3)
}

fn throughputs(stages: &[StageReport], precision: &'static str) -> Vec<Throughput> {
    let time = |stage| seconds(stages, precision, stage);
    let (Some(text), Some(decode)) = (time(Stage::Llama), time(Stage::DcaeDecode)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for steps in [4, 20] {
        let guided = Stage::is_guided(steps);
        for rows in [1, 2, 4, 8, 16, 32, 64] {
            let batch = if guided { rows / 2 } else { rows };
            let forward = time(Stage::Emmdit {
                large: false,
                batch: rows,
            });
            if let (1.., Some(forward)) = (batch, forward) {
                let each = text + steps as f64 * forward / batch as f64 + decode;
                found.push(Throughput {
                    precision,
                    steps,
                    guided,
                    batch,
                    images_per_second: 1.0 / each,
                });
            }
        }
    }
    found
}

fn table_rows(
    model: &EmmditConfig,
    suite: &Suite,
    stages: &[StageReport],
    throughputs: &[Throughput],
    precision: &'static str,
) -> Vec<TableRow> {
    let parameters: usize = model.parameter_counts().iter().map(|(_, n)| n).sum();
    let row = |steps: usize| {
        let latency = seconds(stages, precision, Stage::Prompt { steps })?;
        let (images_per_second, batch) = throughputs
            .iter()
            .filter(|t| t.precision == precision && t.steps == steps)
            .map(|t| (t.images_per_second, t.batch))
            .fold((1.0 / latency, 1), |best, next| {
                if next.0 > best.0 { next } else { best }
            });
        Some(TableRow {
            model: "E-MMDiT, 512 px",
            precision,
            steps,
            images_per_second,
            batch,
            latency_ms: 1e3 * latency,
            parameters_m: parameters as f64 / 1e6,
            tflop: model.gflop(suite.text_tokens) / 1e3,
        })
    };
    [20, 4].into_iter().filter_map(row).collect()
}
