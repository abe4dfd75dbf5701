//! `nitro cache`: what is kept on disk to be faster next time.

use anyhow::Context;
use clap::Args;
use nitro::{CacheFolder, caches};
use serde_json::json;

use super::failure::say;

/// Arguments of `nitro cache`.
#[derive(Args)]
pub(super) struct CacheArgs {
    /// Remove everything that is kept
    #[arg(long)]
    clear: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: &CacheArgs) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for cache in caches() {
        let about = || match cache.path() {
            Some(path) => format!("the cache of {} in {}", cache.holds(), path.display()),
            None => format!("the cache of {}", cache.holds()),
        };
        if args.clear {
            cache
                .clear()
                .with_context(|| format!("clearing {}", about()))?;
        }
        let files = cache.files().with_context(about)?;
        found.push((cache, files));
    }
    if args.json {
        let list: Vec<_> = found
            .iter()
            .map(|(cache, files)| {
                let files = files
                    .iter()
                    .map(|(path, bytes)| json!({ "path": path, "bytes": bytes }));
                json!({
                    "holds": cache.holds(),
                    "folder": cache.path(),
                    "variable": cache.variable(),
                    "limit_bytes": cache.limit(),
                    "files": files.collect::<Vec<_>>(),
                })
            })
            .collect();
        say(serde_json::to_string_pretty(&list)?);
    } else {
        let lines: Vec<String> = found
            .iter()
            .map(|(c, files)| line(c, files.len(), bytes(files)))
            .collect();
        say(lines.join("\n"));
    }
    Ok(())
}

fn bytes<P>(files: &[(P, u64)]) -> u64 {
    files.iter().map(|(_, bytes)| bytes).sum()
}

fn line(cache: &CacheFolder, files: usize, bytes: u64) -> String {
    let (holds, variable) = (cache.holds(), cache.variable());
    match cache.path() {
        Some(path) => format!(
            "{holds:<15} {files:>4} files, {:>7.1} of {} MB, in {} ({variable})",
            bytes as f64 / 1e6,
            cache.limit() / 1_000_000,
            path.display()
        ),
        None => format!("{holds:<15} switched off ({variable})"),
    }
}
