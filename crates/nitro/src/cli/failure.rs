//! From errors to one line on standard error and an exit code.

use std::io::Write;
use std::process::ExitCode;

use nitro::PipelineError;
use nitro::bench::BenchError;
use nitro_data::DataError;
use nitro_train::TrainError;

use super::ranks;

/// The model, the disk or the network failed.
const FAILED: u8 = 1;
/// What was asked cannot be done; clap uses the same code for arguments it cannot read.
const BAD_INPUT: u8 = 2;
/// Stopped with Ctrl-C, as shells report it (128 + SIGINT).
pub(super) const INTERRUPTED: u8 = 130;

/// The user asked for something that cannot be done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadInput(pub(super) String);

/// A [`BadInput`] error with this message.
pub(super) fn bad_input(message: impl Into<String>) -> anyhow::Error {
    BadInput(message.into()).into()
}

/// Prints `error` as one line and chooses the exit code.
pub(super) fn report(error: &anyhow::Error) -> ExitCode {
    let code = error.chain().find_map(|cause| {
        if cause.is::<BadInput>() {
            return Some(BAD_INPUT);
        }
        match cause.downcast_ref::<TrainError>() {
            Some(TrainError::Interrupted { .. }) => return Some(INTERRUPTED),
            Some(TrainError::Config { .. } | TrainError::Resume { .. }) => return Some(BAD_INPUT),
            Some(TrainError::Dataset(error)) => return data_code(error),
            _ => {}
        }
        if let Some(BenchError::Cancelled) = cause.downcast_ref() {
            return Some(INTERRUPTED);
        }
        if let Some(code) = cause.downcast_ref::<DataError>().and_then(data_code) {
            return Some(code);
        }
        match cause.downcast_ref::<PipelineError>()? {
            PipelineError::Cancelled { .. } => Some(INTERRUPTED),
            e if e.is_bad_request() => Some(BAD_INPUT),
            _ => None,
        }
    });
    let (code, who) = (code.unwrap_or(FAILED), ranks::failing());
    // Where standard error is closed there is nobody to tell; the code still says it.
    let _ = writeln!(std::io::stderr(), "error: {who}{}", one_line(error));
    ranks::abort(code);
    ExitCode::from(code)
}

fn data_code(error: &DataError) -> Option<u8> {
    match error {
        DataError::Stopped => Some(INTERRUPTED),
        DataError::Io { .. } | DataError::Damaged { .. } => None,
        _ => Some(BAD_INPUT),
    }
}

/// Prints a line on standard output; a reader that went away is no failure. Of several processes, the
/// first talks.
pub(super) fn say(line: impl std::fmt::Display) {
    if !ranks::is_first() {
        return;
    }
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The messages of the whole chain of causes. Many of our messages already quote their cause.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let message = cause.to_string();
        if line.is_empty() {
            line = message;
        } else if !line.contains(&message) {
            line = format!("{line}: {message}");
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
