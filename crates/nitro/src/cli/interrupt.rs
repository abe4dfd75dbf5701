//! Ctrl-C: between steps while pictures are made, at once otherwise.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use super::failure::INTERRUPTED;

/// Whether someone looks at [`ASKED`] and will stop by itself.
static WATCHED: AtomicBool = AtomicBool::new(false);
/// Whether Ctrl-C was pressed while watched.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end the work at the next [`check`]; a second one, or one while nothing watches, ends
/// the program at once. Downloads that end so are resumed by the next run.
pub(super) fn install() {
    let handler = || {
        if !WATCHED.load(Ordering::SeqCst) || ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    };
    // Without a handler Ctrl-C ends the program at once, which is no reason not to work.
    let _ = ctrlc::set_handler(handler);
}

/// Runs `work`, during which Ctrl-C waits for [`check`].
pub(super) fn watched<T>(work: impl FnOnce() -> T) -> T {
    WATCHED.store(true, Ordering::SeqCst);
    let result = work();
    WATCHED.store(false, Ordering::SeqCst);
    result
}

/// `Break` once Ctrl-C was pressed.
pub(super) fn check() -> ControlFlow<()> {
    match ASKED.load(Ordering::SeqCst) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// The flag itself, for work that looks at it on its own.
pub(super) fn flag() -> &'static AtomicBool {
    &ASKED
}
