//! The `nitro` command.

mod cli;

use std::process::ExitCode;

/// Activations are large and short-lived; the system's allocator would return their pages to the
/// kernel and fault them in again for every layer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::run()
}
