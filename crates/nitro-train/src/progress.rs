//! What a run says while it goes: a progress bar, `metrics.jsonl`, and TensorBoard's event files.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::TrainError;
use crate::config::CommonConfig;
use crate::tensorboard::EventWriter;

/// One line of the log, as JSON.
pub(crate) type Line = Value;

/// Averages between two lines of the log.
pub(crate) struct Meter {
    since: Instant,
    waited: Duration,
    steps: u64,
    sums: Vec<(&'static str, f64)>,
}

impl Meter {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            waited: Duration::ZERO,
            steps: 0,
            sums: Vec::new(),
        }
    }

    /// Adds time spent waiting for data.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.waited += time;
    }

    /// Adds the numbers of one step.
    pub(crate) fn add(&mut self, numbers: &[(&'static str, f64)]) {
        self.steps += 1;
        for (name, value) in numbers {
            match self.sums.iter_mut().find(|(key, _)| key == name) {
                Some((_, sum)) => *sum += value,
                None => self.sums.push((name, *value)),
            }
        }
    }

    /// The line at `step`, and a new beginning.
    pub(crate) fn take(&mut self, step: u64, lr: f64, batch: usize, skipped: u64) -> Line {
        let n = self.steps.max(1) as f64;
        let seconds = self.since.elapsed().as_secs_f64();
        let mut line = json!({ "step": step });
        for (name, sum) in &self.sums {
            line[*name] = json!(sum / n);
        }
        line["lr"] = json!(lr);
        line["images_per_second"] = json!(self.steps as f64 * batch as f64 / seconds);
        line["data_share"] = json!(self.waited.as_secs_f64() / seconds);
        line["skipped_steps"] = json!(skipped);
        *self = Self::new();
        line
    }
}

/// Where a run's numbers go. Ranks other than 0 have a silent one.
pub(crate) struct Log {
    bar: ProgressBar,
    /// Lines instead of a bar: standard error is a file or a pipe.
    plain: bool,
    files: Option<Files>,
}

struct Files {
    path: PathBuf,
    metrics: std::fs::File,
    events: EventWriter,
}

impl Log {
    /// Opens the files of `dir` for a run that goes on from `step`; `writes` is false on all ranks
    /// but 0.
    pub(crate) fn open(
        dir: &Path,
        step: u64,
        config: &CommonConfig,
        writes: bool,
        quiet: bool,
    ) -> Result<Self, TrainError> {
        let silent = quiet || !writes;
        let bar = match silent {
            true => ProgressBar::hidden(),
            false => progress_bar(config, step),
        };
        let plain = !silent && bar.is_hidden();
        let files = writes.then(|| Files::open(dir, step)).transpose()?;
        Ok(Self { bar, plain, files })
    }

    pub(crate) fn say(&self, text: impl AsRef<str>) {
        match self.plain {
            true => eprintln!("{}", text.as_ref()),
            false => self.bar.println(text),
        }
    }

    /// Tells what must not be missed, on a terminal or not.
    pub(crate) fn warn(&self, text: String) {
        if self.files.is_some() {
            self.bar.suspend(|| eprintln!("warning: {text}"));
        }
    }

    pub(crate) fn position(&self, step: u64) {
        self.bar.set_position(step);
    }

    /// Tells something beside the progress bar until the next line.
    pub(crate) fn message(&self, text: String) {
        self.bar.set_message(text);
    }

    pub(crate) fn finish(&self, whole: bool) {
        match whole {
            true => self.bar.finish(),
            false => self.bar.abandon(),
        }
    }

    /// Writes a line to the terminal and both files.
    pub(crate) fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        if let Some(score) = line["score"].as_f64() {
            self.say(format!("step {}: score {score:.3}", line["step"]));
        }
        if line["images_per_second"].is_number() {
            let text = message(line);
            if self.plain {
                let left = indicatif::HumanDuration(self.bar.eta());
                let steps = self.bar.length().unwrap_or_default();
                self.say(format!("step {}/{steps} {text} eta {left}", line["step"]));
            }
            self.bar.set_message(text);
        }
        let Some(files) = &mut self.files else {
            return Ok(());
        };
        writeln!(files.metrics, "{line}").map_err(|source| TrainError::Io {
            path: files.path.clone(),
            source,
        })?;
        let numbers = line.as_object().into_iter().flatten();
        let step = line["step"].as_u64().unwrap_or_default();
        let scalars = numbers
            .filter(|(name, _)| *name != "step")
            .filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)));
        files.events.scalars(step, scalars)
    }

    /// Shows the newest of the sample pictures in TensorBoard.
    pub(crate) fn picture(&mut self, step: u64, path: &Path) -> Result<(), TrainError> {
        let (Some(files), Ok(png)) = (&mut self.files, std::fs::read(path)) else {
            return Ok(());
        };
        let size = image::image_dimensions(path).unwrap_or_default();
        files.events.picture(step, "samples", size, &png)
    }
}

impl Files {
    fn open(dir: &Path, step: u64) -> Result<Self, TrainError> {
        let path = dir.join("metrics.jsonl");
        let io = |source| TrainError::Io {
            path: dir.join("metrics.jsonl"),
            source,
        };
        // A killed process may have written lines of steps that are now done again.
        if let Ok(text) = std::fs::read_to_string(&path) {
            let before = |line: &str| {
                serde_json::from_str::<Value>(line)
                    .ok()
                    .and_then(|line| line["step"].as_u64())
                    .is_some_and(|at| at <= step)
            };
            let kept: Vec<&str> = text.lines().filter(|line| before(line)).collect();
            if kept.len() < text.lines().count() {
                let kept: String = kept.iter().flat_map(|line| [*line, "\n"]).collect();
                crate::files::write_whole(&path, kept.as_bytes())?;
            }
        }
        let mut options = std::fs::OpenOptions::new();
        let metrics = options.create(true).append(true).open(&path).map_err(io)?;
        Ok(Self {
            metrics,
            path,
            events: EventWriter::create(&dir.join("tensorboard"), step)?,
        })
    }
}

fn message(line: &Line) -> String {
    let mut text = String::new();
    let number = |key: &str| line.get(key).and_then(Value::as_f64);
    let fields = [
        ("loss", "loss"),
        ("proj_loss", "repa"),
        ("grad_norm", "norm"),
    ];
    for (key, name) in fields {
        if let Some(value) = number(key) {
            text += &format!("{name} {value:.4} ");
        }
    }
    let lr = number("lr").unwrap_or_default();
    let speed = number("images_per_second").unwrap_or_default();
    let data = 100.0 * number("data_share").unwrap_or_default();
    text += &format!("lr {lr:.1e} {speed:.1}/s data {data:.1} %");
    let skipped = number("skipped_steps").unwrap_or_default();
    if skipped > 0.0 {
        text += &format!(" skipped {skipped}");
    }
    text
}

fn progress_bar(config: &CommonConfig, position: u64) -> ProgressBar {
    let bar = ProgressBar::new(config.max_steps).with_position(position);
    if let Ok(style) = ProgressStyle::with_template("{bar:16} {pos}/{len} {wide_msg} eta {eta}") {
        bar.set_style(style);
    }
    // The estimate starts here: without the tick it would count the steps of earlier starts.
    bar.tick();
    bar.reset_eta();
    bar
}
