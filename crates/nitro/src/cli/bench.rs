//! `nitro bench`: how fast this machine is, and the full-size models on it.

use std::ops::ControlFlow;
use std::time::Duration;

use clap::Args;
use nitro::bench::{
    self, Event, Machine, OpReport, Options, Peaks, Report, Stage, StageReport, Suite,
};
use nitro_kernels::isa::Isa;
use nitro_kernels::peak::{Product, instruction};

use super::failure::say;
use super::interrupt;
use super::model_args::{PrecisionName, use_threads};
use super::progress::Progress;

/// Rows of `--per-op` for each stage.
const OPS_SHOWN: usize = 16;

/// Arguments of `nitro bench`.
#[derive(Args)]
pub(super) struct BenchArgs {
    /// Stages to run, separated by commas [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = str::parse::<Stage>)]
    stages: Vec<Stage>,
    /// How products are computed; several, separated by commas, are measured one after the other
    /// [default: bf16 where the processor has instructions for it, else f32]
    #[arg(long, value_enum, value_name = "NAMES", value_delimiter = ',')]
    precision: Vec<PrecisionName>,
    /// Timed runs of each stage; slow stages stop earlier, but not before three
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Also show which operations each stage's time goes to
    #[arg(long)]
    per_op: bool,
    /// Keep packed weights in a file, and run the stages as a second start does, over weights that
    /// are mapped from there
    #[arg(long)]
    second_start: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// CPU threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// No progress on standard error
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the command.
pub(super) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    interrupt::install();
    use_threads(args.threads)?;
    let suite = Suite::nitro_e()?;
    let options = args.options();
    let progress = Progress::new(args.quiet);
    let result = interrupt::watched(|| {
        nitro_kernels::pool::install(|| {
            bench::run(&suite, &options, &mut |event| args.show(event, &progress))
        })
    });
    progress.clear();
    let report = result?;
    if args.json {
        say(serde_json::to_string_pretty(&report)?);
    } else {
        show_summary(&report);
    }
    Ok(())
}

impl BenchArgs {
    fn options(&self) -> Options {
        let mut options = Options {
            runs: usize::from(self.runs),
            per_op: self.per_op,
            second_start: self.second_start,
            precisions: self.precision.iter().map(|p| p.precision()).collect(),
            ..Options::default()
        };
        if !self.stages.is_empty() {
            options.stages.clone_from(&self.stages);
        }
        if self.precision.is_empty() {
            let bf16 = instruction(Product::Bf16, Isa::current()).is_some();
            let name = if bf16 {
                PrecisionName::Bf16
            } else {
                PrecisionName::F32
            };
            options.precisions = vec![name.precision()];
        }
        options.budget = options
            .budget
            .max(Duration::from_secs(2) * u32::from(self.runs));
        options
    }

    /// Follows the bench: progress on standard error, and without `--json` each result on standard
    /// output as soon as it is known.
    fn show(&self, event: &Event<'_>, progress: &Progress) -> ControlFlow<()> {
        let print = |text: String| {
            if !self.json {
                progress.suspend(|| say(text.trim_end()));
            }
        };
        match event {
            Event::Peaks => progress.stage("measuring the machine's peaks"),
            Event::PeaksDone(machine, peaks) => {
                print(machine_text(machine, peaks) + "\n" + &HEAD.line())
            }
            Event::Loading(name) => progress.stage(&format!("making {name}")),
            Event::Running {
                stage,
                precision,
                done,
                total,
            } => {
                if *done == 0 {
                    let name = format!("{stage} {}", precision.name());
                    progress.count(&name, *total as u64);
                }
                progress.set(*done as u64);
            }
            Event::Done(stage) => {
                print(Row::of(stage).line());
                if let Some(ops) = &stage.per_op {
                    print(ops_text(ops));
                }
            }
            Event::Skipped {
                stage,
                precision,
                reason,
            } => progress.suspend(|| {
                eprintln!("{stage} {} is left out: {reason}", precision.name());
            }),
            _ => {}
        }
        interrupt::check()
    }
}

fn machine_text(machine: &Machine, peaks: &Peaks) -> String {
    let cpu = machine.cpu.as_deref().unwrap_or("unknown processor");
    let memory = match machine.memory_mib {
        Some(mib) => format!(", {} GiB", mib.div_ceil(1024)),
        None => String::new(),
    };
    let mut text = format!(
        "{cpu}: {} cores, {} threads used, {}{memory}\n\n{:<28} {:>12} {:>12}\n",
        machine.cores, machine.threads, machine.isa, "peaks", "one thread", "all threads"
    );
    for (name, rate, unit) in [
        ("f32", &peaks.f32, "GFLOP/s"),
        ("bf16", &peaks.bf16, "GFLOP/s"),
        ("int8", &peaks.int8, "Gop/s"),
    ] {
        text += &match rate {
            Some(rate) => format!(
                "{:<28} {:>12.0} {:>12.0} {unit}\n",
                format!("{name}, {}", rate.instruction),
                rate.one_thread,
                rate.all_threads
            ),
            None => format!("{name:<28} no instruction of its own\n"),
        };
    }
    let memory = &peaks.memory;
    for (name, one, all) in [
        (
            "memory, read",
            memory.read_one_thread,
            memory.read_all_threads,
        ),
        (
            "memory, copy",
            memory.copy_one_thread,
            memory.copy_all_threads,
        ),
    ] {
        text += &format!("{name:<28} {one:>12.1} {all:>12.1} GB/s\n");
    }
    text
}

/// A line of the table of stages.
struct Row([String; 8]);

const WIDTHS: [usize; 8] = [22, 9, 11, 9, 10, 8, 10, 12];

struct Head([&'static str; 8]);

const HEAD: Head = Head([
    "stage",
    "precision",
    "median ms",
    "GFLOP",
    "GFLOP/s",
    "of peak",
    "images/s",
    "peak MiB",
]);

impl Head {
    fn line(&self) -> String {
        Row(self.0.map(str::to_owned)).line()
    }
}

impl Row {
    fn of(stage: &StageReport) -> Self {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        Self([
            stage.name.clone(),
            stage.precision.to_owned(),
            format!("{:.1}", stage.median_ms),
            format!("{:.1}", stage.gflop),
            format!("{:.0}", stage.gflops),
            or_dash(stage.percent_of_peak.map(|p| format!("{p:.0} %"))),
            or_dash(stage.images_per_second.map(|n| format!("{n:.2}"))),
            or_dash(stage.peak_memory_mib.map(|n| n.to_string())),
        ])
    }

    fn line(&self) -> String {
        let mut line = format!("{:<1$}", self.0[0], WIDTHS[0]);
        for (cell, width) in self.0.iter().zip(WIDTHS).skip(1) {
            line += &format!(" {cell:>width$}");
        }
        line
    }
}

fn ops_text(ops: &[OpReport]) -> String {
    let line = |op: &OpReport| {
        let calls = match op.calls {
            0 => String::new(),
            calls => format!("{calls}x"),
        };
        let rate = op
            .gflops
            .map_or(String::new(), |g| format!("{g:>7.0} GFLOP/s"));
        format!(
            "    {:>9.1} ms {:>5.1} % {calls:>6} {rate:<16} {}\n",
            op.ms, op.percent, op.op
        )
    };
    // The last row is what is left over.
    let Some((rest, seen)) = ops.split_last() else {
        return String::new();
    };
    let mut text: String = seen.iter().take(OPS_SHOWN).map(line).collect();
    let hidden = seen.iter().skip(OPS_SHOWN);
    let (count, ms, percent) = hidden.fold((0, 0.0, 0.0), |(count, ms, percent), op| {
        (count + 1, ms + op.ms, percent + op.percent)
    });
    if count > 0 {
        text += &format!(
            "    {ms:>9.1} ms {percent:>5.1} % {:>23} {count} more\n",
            ""
        );
    }
    text + &line(rest)
}

fn show_summary(report: &Report) {
    let mut text = String::from("\nmodel           precision  parameters    load ms  holds MiB");
    let again = report.models.iter().any(|load| load.second.is_some());
    text += match again {
        true => "   write ms   file MiB  load again ms\n",
        false => "\n",
    };
    for load in &report.models {
        let held = load.resident_mib.map_or("-".to_owned(), |n| n.to_string());
        text += &format!(
            "{:<15} {:>9} {:>9.1} M {:>10.0} {held:>10}",
            load.model,
            load.precision,
            load.parameters as f64 / 1e6,
            load.load_ms
        );
        if let Some(second) = &load.second {
            text += &format!(
                " {:>10.0} {:>10} {:>14.1}",
                second.save_ms, second.file_mib, second.load_ms
            );
        }
        text += "\n";
    }
    if !report.images_per_second.is_empty() {
        text += "\nimages/s at 512 px, from the stages above\n";
    }
    for rate in &report.images_per_second {
        text += &format!(
            "{:>4}, {:>2} steps {:<18} batch {:>2} {:>8.3}\n",
            rate.precision,
            rate.steps,
            if rate.guided {
                "with guidance,"
            } else {
                "without guidance,"
            },
            rate.batch,
            rate.images_per_second
        );
    }
    if !report.table2.is_empty() {
        text += "\nas the paper's Table 2            images/s (batch)  latency ms  parameters  TFLOPs\n";
    }
    for row in &report.table2 {
        text += &format!(
            "{:<33} {:>8.3} ({:>5}) {:>11.0} {:>9.1} M {:>7.3}\n",
            format!("{}, {}, {} steps", row.model, row.precision, row.steps),
            row.images_per_second,
            row.batch,
            row.latency_ms,
            row.parameters_m,
            row.tflop
        );
    }
    say(text.trim_end());
}
