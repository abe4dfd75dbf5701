//! `nitro data` as its users meet it, with the embedded miniature as model.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nitro_data::image::{encode_jpeg, to_planes, vae_picture};
use nitro_data::mds::{Dataset, INDEX};
use serde_json::Value;
use support::{golden, nitro, said, stderr, stdout};

fn data(home: &Path, arguments: &[&str]) -> Command {
    let mut command = nitro(home);
    command.arg("data").args(arguments);
    command
}

fn done(home: &Path, arguments: &[&str]) -> Output {
    let output = data(home, arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

fn json(output: &Output) -> Value {
    serde_json::from_str(stdout(output).trim()).unwrap_or_else(|e| panic!("{e}: {}", said(output)))
}

/// `count` pictures with captions, and one picture without.
fn photos(dir: &Path, count: u32) {
    fs::create_dir_all(dir).unwrap();
    for i in 0..count {
        let colour = move |x: u32, y: u32| image::Rgb([(x * 3 + i * 40) as u8, (y * 2) as u8, 120]);
        let picture = image::RgbImage::from_fn(140 + 9 * i, 130, colour);
        let name = dir.join(format!("{i:02}"));
        fs::write(
            name.with_extension("jpg"),
            encode_jpeg(&picture, 90).unwrap(),
        )
        .unwrap();
        fs::write(
            name.with_extension("txt"),
            format!("a red circle number {i}"),
        )
        .unwrap();
    }
    fs::write(
        dir.join("silent.jpg"),
        encode_jpeg(&image::RgbImage::new(9, 9), 90).unwrap(),
    )
    .unwrap();
}

#[test]
fn a_folder_becomes_shards_that_can_be_looked_into() {
    let home = tempfile::tempdir().unwrap();
    photos(&home.path().join("photos"), 5);
    let ingest = [
        "ingest", "folder", "photos", "--out", "set", "--hashes", "sha1",
    ];
    let output = done(home.path(), &ingest);
    let said_so = stdout(&output);
    assert!(said_so.contains("5 samples in 1 shard"), "{said_so}");
    assert!(said_so.contains("left out: 1 (no caption)"), "{said_so}");
    assert!(said_so.contains("silent.jpg"), "{said_so}");
    // Again: nothing is done twice.
    let again = json(&done(home.path(), &[&ingest[..], &["--json"]].concat()));
    assert_eq!(
        (&again["samples"], &again["written_now"]),
        (&5.into(), &0.into())
    );

    let inspect = [
        "inspect",
        "set",
        "--verify",
        "--json",
        "--sheet",
        "sheet.png",
    ];
    let output = done(home.path(), &inspect[..4]);
    let about = json(&output);
    assert_eq!(about["samples"], 5);
    assert_eq!(about["columns"][1]["name"], "jpg");
    assert_eq!(about["picture_sides"]["least"], 130);
    let sheet = ["inspect", "set", "--sheet", "sheet.png", "--pictures", "4"];
    assert!(stdout(&done(home.path(), &sheet)).contains("a red circle number 3"));
    let sheet = image::open(home.path().join("sheet.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (320, 320));

    // Damage is named, and ends the command with 1.
    let shard = home.path().join("set/shard.00000.mds");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let output = data(home.path(), &inspect[..3]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains("shard.00000.mds: sha1 is"),
        "{}",
        said(&output)
    );
}

#[test]
fn features_are_those_of_the_model_in_the_official_columns() {
    let home = tempfile::tempdir().unwrap();
    photos(&home.path().join("photos"), 3);
    done(home.path(), &["ingest", "folder", "photos", "--out", "set"]);
    let precompute = [
        "precompute",
        "set",
        "--out",
        "features",
        "--size",
        "128",
        "--latents",
        "--text",
        "--keep-pictures",
        "--batch",
        "2",
    ];
    let output = done(home.path(), &precompute);
    assert!(stdout(&output).contains("images/s"), "{}", said(&output));
    let set = Dataset::open(home.path().join("features")).unwrap();
    let names: Vec<&str> = set
        .schema()
        .columns()
        .iter()
        .map(|c| c.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["caption", "jpg", "latents_128", "text_feat", "text_mask"]
    );
    let parts = nitro::EncoderParts {
        texts: true,
        pictures: true,
        ..Default::default()
    };
    let encoders = nitro::Encoders::load(
        nitro::MINIATURE.into(),
        nitro::HubOptions::from_env(),
        parts,
        burn::tensor::Device::flex(),
        nitro_ops::Precision::F32,
    )
    .unwrap();
    for index in 0..3 {
        let sample = set.sample(index).unwrap();
        let picture = vae_picture(&sample.picture("jpg").unwrap(), 128);
        let pixels = to_planes(&picture, [0.5; 3], [0.5; 3]);
        let latents = encoders.encode_pictures(pixels, 1, 128).unwrap();
        let expected: Vec<f32> = latents.into_data().try_into_vec().unwrap();
        close(&sample.f16s("latents_128").unwrap(), &expected);
        let text = encoders
            .encode_texts(&[sample.text("caption").unwrap()], true)
            .unwrap();
        let expected: Vec<f32> = text.features.into_data().try_into_vec().unwrap();
        close(&sample.f16s("text_feat").unwrap(), &expected);
        let mask: Vec<i64> = text.tokens[0].mask().into_iter().map(i64::from).collect();
        assert_eq!(sample.i64s("text_mask").unwrap(), mask);
    }

    // Two ranks make the same dataset in two folders with one index.
    for rank in ["1", "0"] {
        let ranks = ["--rank", rank, "--ranks", "2", "--out", "shared"];
        done(
            home.path(),
            &[&precompute[..2], &precompute[4..], &ranks].concat(),
        );
    }
    let shared = Dataset::open(home.path().join("shared")).unwrap();
    assert_eq!(shared.len(), 3);
    for index in 0..3 {
        let both = [&set, &shared].map(|set| set.sample(index).unwrap());
        let captions = both.each_ref().map(|s| s.text("caption").unwrap());
        assert_eq!(captions[0], captions[1]);
    }
}

#[test]
fn dino_features_have_the_official_column() {
    let home = tempfile::tempdir().unwrap();
    photos(&home.path().join("photos"), 2);
    done(home.path(), &["ingest", "folder", "photos", "--out", "set"]);
    let case = golden("dinov2/nitro_resampled");
    let about: Value = serde_json::from_slice(&fs::read(case.join("case.json")).unwrap()).unwrap();
    let model = home.path().join("dino");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), about["config"].to_string()).unwrap();
    fs::copy(
        case.join("weights.safetensors"),
        model.join("model.safetensors"),
    )
    .unwrap();
    let grid = ["--dino-grid", "3"];
    let arguments = ["precompute", "set", "--dino", "dino", "--out", "features"];
    done(home.path(), &[&arguments[..], &grid].concat());
    let set = Dataset::open(home.path().join("features")).unwrap();
    let width = about["config"]["embed_dim"].as_u64().unwrap() as usize;
    let features = [0, 1].map(|i| set.sample(i).unwrap().f16s("dino_feat").unwrap());
    assert_eq!(features[0].len(), 3 * 3 * width);
    assert_ne!(features[0], features[1]);
}

/// Equal within the rounding of `float16`.
fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 2e-3 * b.abs().max(1.0), "{a} and {b}");
    }
}

#[test]
fn a_killed_synthesis_goes_on_and_makes_the_same_pictures() {
    let home = tempfile::tempdir().unwrap();
    let prompts: String = (0..12)
        .map(|i| format!("a red circle and {i} stars\n"))
        .collect();
    fs::write(home.path().join("prompts.txt"), prompts + "\n").unwrap();
    let synthesize = |out| {
        let arguments = [
            "synthesize",
            "prompts.txt",
            "--steps",
            "1",
            "--batch",
            "1",
            "--out",
            out,
        ];
        data(home.path(), &arguments)
    };
    let output = synthesize("whole").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(
        stdout(&output).contains("left out: 1 (empty prompt)"),
        "{}",
        said(&output)
    );

    let mut child = synthesize("killed")
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pending = home.path().join("killed/nitro-job.pending");
    let begun = Instant::now();
    // Killed once it has made a few pictures; should it be faster, there is only less to go on with.
    while fs::metadata(&pending).map_or(0, |about| about.len()) < 10_000
        && child.try_wait().unwrap().is_none()
        && begun.elapsed() < Duration::from_secs(60)
    {
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    child.wait().unwrap();
    let output = synthesize("killed").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let read = |out: &str| fs::read(home.path().join(out).join("shard.00000.mds")).unwrap();
    assert!(read("whole") == read("killed"), "the shards differ");
    assert!(!pending.exists());
    // The prompts of a dataset serve as well.
    let again = [
        "synthesize",
        "whole",
        "--steps",
        "1",
        "--limit",
        "2",
        "--out",
        "again",
    ];
    done(home.path(), &again);
    assert_eq!(Dataset::open(home.path().join("again")).unwrap().len(), 2);
}

#[test]
fn what_cannot_be_done_is_told_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    photos(&home.path().join("photos"), 2);
    let ingest = ["ingest", "folder", "photos", "--out", "set"];
    done(home.path(), &ingest);
    let refused: [(&[&str], &str); 8] = [
        (
            &["ingest", "folder", "none", "--out", "x"],
            "no such file or folder",
        ),
        (
            &["ingest", "webdataset", "photos", "--out", "x"],
            "holds no .tar, .tar.gz",
        ),
        (
            &[
                "ingest",
                "folder",
                "photos",
                "--out",
                "set",
                "--min-side",
                "5",
            ],
            "another job",
        ),
        (&["inspect", "photos"], "index.json"),
        (&["precompute", "set", "--out", "x"], "nothing to add"),
        (
            &[
                "precompute",
                "set",
                "--out",
                "x",
                "--latents",
                "--size",
                "100",
            ],
            "multiple of",
        ),
        (
            &[
                "precompute",
                "set",
                "--out",
                "x",
                "--text",
                "--rank",
                "2",
                "--ranks",
                "2",
            ],
            "rank 2 of 2",
        ),
        (
            &["synthesize", "none.txt", "--out", "x"],
            "no such file or folder",
        ),
    ];
    for (arguments, expected) in refused {
        let output = data(home.path(), arguments).output().unwrap();
        assert!(!output.status.success(), "{}", said(&output));
        assert!(
            stderr(&output).contains(expected),
            "{arguments:?}: {}",
            said(&output)
        );
        assert!(!home.path().join("x").join(INDEX).exists());
    }
}
