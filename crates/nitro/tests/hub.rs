//! Models from the Hub, against a server on loopback that speaks its protocol.

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};

use nitro::{Hub, HubError, HubOptions};
use support::hub_server::{Behaviour, HubServer, TOKEN};
use support::{files_below, golden_model, nitro, said, stderr};

const LLAMA: &str = "meta-llama/Llama-3.2-1B";
const WEIGHTS: &str = "Nitro-E-512px-dist.safetensors";

fn generate(home: &Path, endpoint: &str) -> Command {
    let mut command = nitro(home);
    command.args([
        "generate",
        "a red fox",
        "--model",
        "amd/Nitro-E",
        "--variant",
        "dist",
    ]);
    command
        .args(["--steps", "1", "-o", "out.png"])
        .env("HF_ENDPOINT", endpoint);
    command
}

fn options(home: &Path, server: &HubServer) -> HubOptions {
    HubOptions {
        endpoint: server.address().to_owned(),
        cache: home.join("hub"),
        token: None,
        offline: false,
        progress: None,
    }
}

#[track_caller]
fn assert_one_error_line(output: &Output, code: i32, says: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{}", said(output));
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    for part in says {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
}

#[test]
fn a_hub_name_downloads_what_the_variant_needs_and_then_works_offline() {
    let home = tempfile::tempdir().unwrap();
    let server = HubServer::official(Behaviour::default());
    let output = generate(home.path(), server.address()).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let first = std::fs::read(home.path().join("out.png")).unwrap();

    // The standard cache, with nothing of other variants in it.
    let cached = files_below(&home.path().join("huggingface/hub"));
    let has = |end: &str| cached.iter().any(|path| path.ends_with(end));
    assert!(has(WEIGHTS) && has("tokenizer.json"), "{cached:?}");
    assert!(!has("Nitro-E-512px.safetensors"), "{cached:?}");
    let snapshot = cached.iter().find(|path| path.ends_with(WEIGHTS)).unwrap();
    assert!(
        snapshot.starts_with("models--amd--Nitro-E/snapshots"),
        "{snapshot:?}"
    );
    drop(server);

    for offline in [&["--offline"][..], &[]] {
        let mut command = generate(home.path(), "http://127.0.0.1:9");
        if offline.is_empty() {
            command.env("HF_HUB_OFFLINE", "1");
        }
        let output = command.args(offline).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        assert!(
            std::fs::read(home.path().join("out.png")).unwrap() == first,
            "another picture"
        );
    }
}

#[test]
fn a_broken_transfer_is_taken_up_where_it_broke() {
    let home = tempfile::tempdir().unwrap();
    let breaks = HashMap::from([(WEIGHTS.to_owned(), (100_000, 2))]);
    let server = HubServer::official(Behaviour {
        breaks,
        ..Behaviour::default()
    });
    let hub = Hub::new(options(home.path(), &server)).unwrap();
    let path = hub.file("amd/Nitro-E", WEIGHTS).unwrap();
    assert!(std::fs::read(path).unwrap() == std::fs::read(golden_model().join(WEIGHTS)).unwrap());
    let ranges: Vec<String> = server.seen().into_iter().filter_map(|s| s.range).collect();
    for range in ["bytes=0-", "bytes=100000-", "bytes=200000-"] {
        assert!(
            ranges.iter().any(|r| r == range),
            "{range} was not asked for: {ranges:?}"
        );
    }
}

#[test]
fn a_stopped_download_is_resumed_by_the_next_run() {
    let home = tempfile::tempdir().unwrap();
    let breaks = HashMap::from([(WEIGHTS.to_owned(), (50_000, 6))]);
    let server = HubServer::official(Behaviour {
        breaks,
        ..Behaviour::default()
    });
    let hub = Hub::new(options(home.path(), &server)).unwrap();
    let error = hub.file("amd/Nitro-E", WEIGHTS).unwrap_err();
    assert!(matches!(error, HubError::Transfer { .. }), "{error}");
    let path = Hub::new(options(home.path(), &server))
        .unwrap()
        .file("amd/Nitro-E", WEIGHTS);
    assert!(
        std::fs::read(path.unwrap()).unwrap()
            == std::fs::read(golden_model().join(WEIGHTS)).unwrap()
    );
    let ranges: Vec<String> = server.seen().into_iter().filter_map(|s| s.range).collect();
    assert_eq!(ranges.last().unwrap(), "bytes=300000-", "{ranges:?}");
}

#[test]
fn a_download_that_was_stopped_after_its_last_byte_is_completed() {
    let home = tempfile::tempdir().unwrap();
    let server = HubServer::official(Behaviour::default());
    let hub = Hub::new(options(home.path(), &server)).unwrap();
    let file = hub.file("amd/Nitro-E", WEIGHTS).unwrap();
    // Back to the state between the last byte and the renaming.
    let blob = std::fs::canonicalize(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    std::fs::rename(&blob, blob.with_extension("part")).unwrap();
    let file = hub.file("amd/Nitro-E", WEIGHTS).unwrap();
    assert!(std::fs::read(file).unwrap() == std::fs::read(golden_model().join(WEIGHTS)).unwrap());
}

#[test]
fn a_gated_repository_says_how_to_get_in_and_opens_with_the_token() {
    let home = tempfile::tempdir().unwrap();
    let gated = Behaviour {
        gated: vec![LLAMA.to_owned()],
        ..Behaviour::default()
    };
    let server = HubServer::official(gated);
    let output = generate(home.path(), server.address()).output().unwrap();
    let terms = format!("{}/{LLAMA}", server.address());
    let steps = [
        "accept its terms",
        "settings/tokens",
        "HF_TOKEN",
        "no token was sent",
        &terms,
    ];
    assert_one_error_line(&output, 1, &steps);

    let output = generate(home.path(), server.address())
        .env("HF_TOKEN", "wrong")
        .output()
        .unwrap();
    assert_one_error_line(&output, 1, &["HTTP 403", "has no access"]);
    assert!(!home.path().join("out.png").exists());

    let output = generate(home.path(), server.address())
        .env("HF_TOKEN", TOKEN)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(home.path().join("out.png").exists());
}

#[test]
fn a_repository_or_file_that_does_not_exist_is_named() {
    let home = tempfile::tempdir().unwrap();
    let server = HubServer::official(Behaviour::default());
    let hub = Hub::new(options(home.path(), &server)).unwrap();
    let error = hub.file("amd/Nitro-E", "no-such-file.json").unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("no-such-file.json"), "{error}");
    let error = hub.file("nobody/nothing", "config.json").unwrap_err();
    assert!(error.to_string().contains("does not exist"), "{error}");
}

#[test]
fn without_network_there_is_one_clear_error() {
    let home = tempfile::tempdir().unwrap();
    // Port 9 (discard) refuses connections on loopback.
    let output = generate(home.path(), "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert_one_error_line(
        &output,
        1,
        &["http://127.0.0.1:9", "cannot download", "check the network"],
    );

    let output = generate(home.path(), "http://127.0.0.1:9")
        .arg("--offline")
        .output()
        .unwrap();
    assert_one_error_line(&output, 1, &["not in the cache", "--offline"]);
    assert!(!home.path().join("out.png").exists());
}
