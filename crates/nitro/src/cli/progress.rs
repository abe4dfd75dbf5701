//! Progress on standard error: hidden when it is no terminal, or with `--quiet`.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nitro::{DownloadProgress, Event, Stage};

use super::{interrupt, ranks};

/// One line that shows what is being done.
#[derive(Clone)]
pub(super) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, target(quiet || !ranks::is_first()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar }
    }

    /// Shows a spinner and `name`.
    pub(super) fn stage(&self, name: &str) {
        self.bar.unset_length();
        self.bar.set_style(style("{spinner} {msg} [{elapsed}]"));
        self.bar.reset();
        self.bar.set_message(name.to_owned());
    }

    /// Says something else beside the spinner or bar that is shown.
    pub(super) fn tell(&self, message: &str) {
        self.bar.set_message(message.to_owned());
    }

    /// Shows a bar for `total` of something.
    pub(super) fn count(&self, name: &str, total: u64) {
        self.bar.set_style(style(
            "{msg} {wide_bar} {pos}/{len} [{elapsed}, {eta} left]",
        ));
        self.bar.reset();
        self.bar.set_length(total);
        self.bar.set_message(name.to_owned());
    }

    /// `done` of the announced total are done.
    pub(super) fn set(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Follows a generation, and ends it when Ctrl-C was pressed.
    pub(super) fn follow(&self, event: &Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Stage(Stage::Text) => self.stage("reading the prompt"),
            Event::Stage(Stage::Decode) => self.stage("decoding"),
            Event::Stage(_) => {}
            Event::Step(step) => {
                if step.done == 1 {
                    self.count("denoising", step.total as u64);
                }
                self.set(step.done as u64);
            }
            _ => {}
        }
        interrupt::check()
    }

    /// Takes the line away while `print` writes.
    pub(super) fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    /// Removes the line.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// One bar per downloaded file.
pub(super) struct Downloads {
    quiet: bool,
    bar: Mutex<ProgressBar>,
}

impl Downloads {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            bar: Mutex::new(ProgressBar::hidden()),
        }
    }

    fn with(&self, act: impl FnOnce(&mut ProgressBar)) {
        act(&mut self
            .bar
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()));
    }
}

impl DownloadProgress for Downloads {
    fn start(&self, repo: &str, file: &str, bytes: u64) {
        self.with(|bar| {
            *bar = ProgressBar::with_draw_target(Some(bytes), target(self.quiet));
            bar.set_style(style(
                "{msg} {wide_bar} {bytes}/{total_bytes} [{bytes_per_sec}, {eta} left]",
            ));
            bar.set_message(format!("{repo}/{file}"));
        });
    }

    fn advance(&self, bytes: u64) {
        self.with(|bar| bar.inc(bytes));
    }

    fn finish(&self) {
        self.with(|bar| bar.finish());
    }
}

fn target(quiet: bool) -> ProgressDrawTarget {
    match quiet {
        true => ProgressDrawTarget::hidden(),
        // Indicatif hides itself where standard error is no terminal.
        false => ProgressDrawTarget::stderr(),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
