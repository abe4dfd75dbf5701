//! What the tests of the command share: running it, and model folders to run it on.
#![allow(dead_code)] // each test binary uses its part

pub(crate) mod browser;
pub(crate) mod hub_server;
pub(crate) mod scorers;
pub(crate) mod service;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The folder of a golden case.
pub(crate) fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(case)
}

/// The golden pipeline's model: the official layout with tiny random weights.
pub(crate) fn golden_model() -> PathBuf {
    golden("pipeline/model")
}

/// A command line that sees none of the caller's Hub settings, cache or model.
pub(crate) fn nitro(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nitro"));
    for name in [
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "NITRO_MODEL",
    ] {
        command.env_remove(name);
    }
    for name in [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_HOME", home.join("huggingface"))
        .current_dir(home);
    command
}

/// What the command said, for messages.
pub(crate) fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "exit code {:?}\nstdout: {}\nstderr: {}",
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr)
    )
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies a folder with everything in it; the copies can be written to.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            std::fs::write(&target, std::fs::read(&path).unwrap()).unwrap();
        }
    }
}

/// All files below `folder`, relative to it, sorted.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path);
            }
        }
    }
    let mut found: Vec<PathBuf> = found
        .iter()
        .map(|p| p.strip_prefix(folder).unwrap().to_owned())
        .collect();
    found.sort();
    found
}

/// Bytes of base64.
pub(crate) fn base64(text: &str) -> Vec<u8> {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.decode(text).unwrap()
}
