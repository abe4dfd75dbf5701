//! Training an E-MMDiT from MDS shards in the official pipeline's columns: order, epochs, resumption in
//! the middle of one, processes, dropped captions, damage, and data that do not fit.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nitro_data::image::encode_jpeg;
use nitro_data::mds::{INDEX, Schema, Value, Writer, WriterOptions};
use nitro_models::{DType, save_safetensors};
use nitro_train::TrainError;
use nitro_train::checkpoint::Checkpoint;
use nitro_train::comm::Thread;
use nitro_train::config::RunConfig;
use nitro_train::miniature;
use nitro_train::null_text;
use nitro_train::plan::plan;
use nitro_train::store::ParameterStore;
use nitro_train::trainer::RunOptions;
use serde_json::Value as Json;

/// Latents of 2 x 4 x 4, 3 text tokens of 8 channels, features of 16 tokens and 6 channels.
const CONFIG: &str = "
run:
  seed: 3
  max_steps: 15
  batch_size: 4
  optimizer: { lr: 1.0e-2, weight_decay: 1.0e-2, eps: 1.0e-8, betas: [0.9, 0.99] }
  warmup_steps: 2
  gradient_clip: 1.0
  ema_rate: 0.9
  precision: f32
  save_every: 4
  log_every: 1
  sample_every: 0
task:
  kind: emmdit
  model:
    sample_size: 4
    in_channels: 2
    out_channels: 2
    heads: 2
    head_dim: 8
    caption_channels: 8
    pos_embed_max_size: 4
    block_groups: [1, 1, 1]
    use_sub_attn: false
    repa: { projector_dim: 8, z_dims: [6] }
  data:
    kind: mds
    datasets: []
    scaling_factor: 0.5
    precompute_txt_emb: true
    precompute_dino_feat: true
  repa: { weight: 0.5 }
  text_tokens: 3
  caption_dropout: 0.2
";
const TOKENS: usize = 3;
const CHANNELS: usize = 8;

/// Values that are another function of `key` for every `column`.
fn wave(column: usize, key: usize, count: usize) -> Vec<f32> {
    let phase = (column * 1000 + key) as f32;
    (0..count)
        .map(|i| (0.37 * i as f32 + phase).sin())
        .collect()
}

/// A dataset of `count` samples, two in a shard; `words` makes its text states others.
fn write(dir: &Path, count: usize, words: usize) {
    let columns = [
        ("caption", "str"),
        ("latents_32", "bytes"),
        ("text_feat", "bytes"),
        ("text_mask", "bytes"),
        ("dino_feat", "bytes"),
    ];
    let options = WriterOptions {
        size_limit: 1200,
        ..WriterOptions::default()
    };
    let mut writer = Writer::create(dir, Schema::new(columns).unwrap(), options).unwrap();
    for i in 0..count {
        let sample = [
            ("caption", Value::Str(format!("sample {i}"))),
            ("latents_32", Value::f16s(&wave(1, i, 2 * 4 * 4))),
            (
                "text_feat",
                Value::f16s(&wave(2 + words, i, TOKENS * CHANNELS)),
            ),
            ("text_mask", Value::i64s([1, 1, 0])),
            ("dino_feat", Value::f16s(&wave(9, i, 16 * 6))),
        ];
        writer.write(&sample).unwrap();
    }
    writer.finish().unwrap();
    write_null_text(dir, 0);
}

fn write_null_text(dir: &Path, words: usize) {
    let states = wave(8 + words, 0, TOKENS * CHANNELS);
    let tensor = ("text_feat".to_owned(), vec![TOKENS, CHANNELS], &states[..]);
    let path = dir.join(null_text::FILE);
    save_safetensors(path, &[tensor], &Default::default(), DType::F16).unwrap();
}

fn config(datasets: &[&Path], overrides: &[&str]) -> RunConfig {
    let names: Vec<String> = datasets.iter().map(|d| d.display().to_string()).collect();
    let datasets = format!("task.data.datasets={names:?}");
    let overrides: Vec<String> = [datasets.as_str()]
        .iter()
        .chain(overrides)
        .map(|text| (*text).to_owned())
        .collect();
    RunConfig::from_text(CONFIG, "the test", &overrides).unwrap()
}

fn quiet() -> RunOptions {
    RunOptions {
        quiet: true,
        ..RunOptions::default()
    }
}

fn train(config: &RunConfig, dir: &Path) -> Result<ParameterStore, TrainError> {
    miniature::run(config, dir, &dir.join("export"), &quiet())?;
    Ok(Checkpoint::latest(dir)?.unwrap().1.store)
}

fn log(dir: &Path) -> Vec<Json> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn numbers(dir: &Path, key: &str) -> Vec<f64> {
    let lines = log(dir);
    lines.iter().filter_map(|line| line[key].as_f64()).collect()
}

#[test]
fn a_run_resumed_within_an_epoch_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Two datasets, 128 samples: 8 batches of 16, so 20 steps are two epochs and a half.
    write(&at("a"), 80, 0);
    write(&at("b"), 48, 0);
    let (a, b) = (at("a"), at("b"));
    let with = |extra: &[&str]| {
        let begin = ["run.batch_size=16", "run.max_steps=20"];
        config(&[&a, &b], &[&begin[..], extra].concat())
    };
    let about = plan(&with(&[]), 1).unwrap().emmdit.unwrap();
    assert_eq!((about.examples, about.steps_per_epoch), (128, 8));
    assert_eq!(about.epochs, 2.5);
    let whole = train(&with(&[]), &at("whole")).unwrap();
    // Stopped in the second epoch and in the third, and read by another number of threads.
    for steps in ["run.max_steps=5", "run.max_steps=11", "run.max_steps=20"] {
        let more = [steps, "task.data.num_workers=5"];
        train(&with(&more), &at("resumed")).unwrap();
    }
    let (_, resumed) = Checkpoint::latest(&at("resumed")).unwrap().unwrap();
    assert_eq!(whole, resumed.store);
    assert_eq!(
        numbers(&at("whole"), "loss"),
        numbers(&at("resumed"), "loss")
    );
    assert_eq!(numbers(&at("whole"), "proj_loss").len(), 20);
    assert_eq!(numbers(&at("whole"), "data_share").len(), 20);

    // The same data in another place are the same training.
    std::fs::rename(&a, at("moved")).unwrap();
    let moved = ["run.batch_size=16", "run.max_steps=21"];
    let moved = config(&[&at("moved"), &b], &moved);
    train(&moved, &at("resumed")).unwrap();
}

#[test]
fn processes_and_parts_see_the_same_batches() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    write(&data, 23, 0);
    let run = |ranks: usize, parts: &str| {
        let dir = folder.path().join(format!("{ranks}-{parts}"));
        let config = config(&[&data], &["run.max_steps=7", parts]);
        Thread::run(ranks, |comm| {
            let options = RunOptions {
                comm: Arc::new(comm),
                ..quiet()
            };
            miniature::run(&config, &dir, &dir.join("export"), &options).unwrap();
        });
        numbers(&dir, "loss")
    };
    let one = run(1, "run.accumulate=1");
    for (ranks, parts) in [(2, "run.accumulate=1"), (2, "run.accumulate=2")] {
        let others = run(ranks, parts);
        assert_eq!(one.len(), others.len());
        for (a, b) in one.iter().zip(&others) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{one:?} {others:?}");
        }
    }
}

#[test]
fn weights_say_how_often_a_dataset_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("a"), 80, 0);
    write(&at("b"), 48, 0);
    let with = |weights: [&str; 2], extra: &[&str]| {
        let place = |name: &str, weight: &str| {
            let path = at(name).display().to_string();
            format!("{{path: {path:?}{weight}}}")
        };
        let streams = [place("a", weights[0]), place("b", weights[1])].join(", ");
        let streams = format!("task.data.datasets=[{streams}]");
        let common = ["run.batch_size=16", "run.max_steps=6", &streams];
        RunConfig::from_text(
            CONFIG,
            "the test",
            &[&common[..], extra]
                .concat()
                .iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>(),
        )
    };
    let steps = |config: &RunConfig| plan(config, 1).unwrap().emmdit.unwrap().steps_per_epoch;
    assert_eq!(steps(&with(["", ""], &[]).unwrap()), 8);
    let twice = with([", repeat: 2", ", choose: 32"], &[]).unwrap();
    assert_eq!(steps(&twice), 12);
    let shares = [", proportion: 3", ", proportion: 1"];
    assert_eq!(
        steps(&with(shares, &["task.data.epoch_size=640"]).unwrap()),
        40
    );

    // A run keeps its weights.
    train(&twice, &at("run")).unwrap();
    let error = train(&with(["", ""], &["run.max_steps=8"]).unwrap(), &at("run")).unwrap_err();
    assert!(error.to_string().contains("[160, 32]"), "{error}");
    train(
        &with([", repeat: 2", ", choose: 32"], &["run.max_steps=8"]).unwrap(),
        &at("run"),
    )
    .unwrap();

    let error = with([", repeat: 2, choose: 3", ""], &[]).unwrap();
    let error = plan(&error, 1).unwrap_err().to_string();
    assert!(error.contains("several weights"), "{error}");
    let error = with([", times: 2", ""], &[]).unwrap_err().to_string();
    assert!(error.contains("times"), "{error}");
    let mixed = with([", proportion: 2", ""], &[]).unwrap();
    let error = plan(&mixed, 1).unwrap_err().to_string();
    assert!(error.contains("proportion"), "{error}");
}

#[test]
fn dropped_captions_are_the_empty_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("a"), 12, 0);
    write(&at("b"), 12, 1); // other words, the same empty prompt
    let run = |data: &str, dropout: &str, dir: &str| {
        let more = [
            "run.max_steps=2",
            "run.save_every=2",
            &format!("task.caption_dropout={dropout}"),
        ];
        train(&config(&[&at(data)], &more), &at(dir)).unwrap()
    };
    let all = run("a", "1.0", "a1");
    assert_eq!(all, run("b", "1.0", "b1"), "no caption is seen");
    let none = run("a", "0.0", "a0");
    assert_ne!(none, run("b", "0.0", "b0"), "captions are seen");
    // The empty prompt is, too.
    write_null_text(&at("b"), 5);
    assert_ne!(all, run("b", "1.0", "b2"));
    assert_eq!(none, run("a", "0.0", "a2"));
}

#[test]
fn a_damaged_shard_ends_the_run_by_name_or_is_passed_over_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("data"), 23, 0);
    let shard = at("data").join("shard.00002.mds");
    std::fs::write(&shard, b"cut off").unwrap();
    let with = |extra: &[&str]| config(&[&at("data")], extra);
    let error = train(&with(&[]), &at("run")).unwrap_err().to_string();
    assert!(error.contains("shard.00002.mds"), "{error}");
    // The same run goes on when it is told to.
    let skip = "task.data.skip_damaged=true";
    let store = train(&with(&[skip]), &at("run")).unwrap();
    let counted = numbers(&at("run"), "damaged_samples");
    assert_eq!(counted.last(), Some(&2.0), "{counted:?}");
    assert_eq!(numbers(&at("run"), "loss").len(), 15, "no batch is missing");
    // What takes the damaged samples' place is a function of the step as well.
    for steps in ["run.max_steps=6", "run.max_steps=15"] {
        train(&with(&[skip, steps]), &at("again")).unwrap();
    }
    let (_, again) = Checkpoint::latest(&at("again")).unwrap().unwrap();
    assert_eq!(store, again.store);
}

#[test]
fn other_data_under_the_same_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("data"), 23, 0);
    let with = |extra: &[&str]| config(&[&at("data")], extra);
    train(&with(&["run.max_steps=4"]), &at("run")).unwrap();
    let before = files(&at("run"));
    let refused = |config: &RunConfig| match train(config, &at("run")).unwrap_err() {
        TrainError::Resume { reason, .. } => reason,
        other => panic!("{other}"),
    };
    let reason = refused(&with(&["task.data.shuffle_seed=1"]));
    assert!(reason.contains("shuffle_seed"), "{reason}");
    write_null_text(&at("data"), 7);
    let reason = refused(&with(&[]));
    assert!(reason.contains("empty prompt"), "{reason}");
    write_null_text(&at("data"), 0);
    std::fs::rename(at("data"), at("aside")).unwrap();
    write(&at("data"), 24, 0);
    let reason = refused(&with(&[]));
    assert!(reason.contains("23 samples"), "{reason}");
    assert_eq!(before, files(&at("run")), "a refused run changes nothing");
}

/// Names and contents of all files below `dir`.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for item in std::fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push((path.clone(), std::fs::read(path).unwrap())),
        }
    }
    all.sort();
    all
}

#[test]
fn what_does_not_fit_is_told_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    write(&data, 23, 0);
    let none = folder.path().join("none");
    let bare = folder.path().join("bare");
    write(&bare, 8, 0);
    std::fs::remove_file(bare.join(null_text::FILE)).unwrap();
    let other = folder.path().join("other");
    write(&other, 8, 0);
    write_null_text(&other, 4);
    let cases: [(&[&Path], &[&str], &str); 10] = [
        (&[], &[], "no dataset folder"),
        (&[&none], &[], "index.json"),
        (&[&data], &["run.batch_size=65"], "no batch of 65"),
        (
            &[&data],
            &[
                "task.model.sample_size=8",
                "task.model.pos_embed_max_size=8",
            ],
            "\"latents_32\" holds 64 bytes",
        ),
        (&[&data], &["task.text_tokens=4"], "[4, 8] values"),
        (&[&data], &["task.model.repa.z_dims=[5]"], "--dino-grid"),
        (
            &[&data],
            &["task.data.precompute_txt_emb=false"],
            "task.frozen",
        ),
        (&[&data], &["task.data.latents=latents_64"], "latents_64"),
        (
            &[&data],
            &["task.data.precompute_dino_feat=false"],
            "names no encoder",
        ),
        (&[&data, &other], &[], "different text encoders"),
    ];
    for (datasets, overrides, expected) in cases {
        let run = folder.path().join("run");
        let Err(error) = train(&config(datasets, overrides), &run) else {
            panic!("{overrides:?}: expected {expected}");
        };
        assert!(
            error.to_string().contains(expected),
            "{overrides:?}: {error}"
        );
        assert!(!run.exists(), "{overrides:?}: nothing was written");
    }
    let error = train(&config(&[&bare], &[]), &folder.path().join("run")).unwrap_err();
    assert!(error.to_string().contains(null_text::FILE), "{error}");
}

/// Captions and pictures as they come: the miniature's text encoder and decoder, a tiny DINOv2.
#[test]
fn captions_and_pictures_are_encoded_as_they_come() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let data = folder.path().join("data");
    let columns = [("caption", "str"), ("jpg", "jpeg"), ("latents_32", "bytes")];
    let schema = Schema::new(columns).unwrap();
    let mut writer = Writer::create(&data, schema, WriterOptions::default()).unwrap();
    for i in 0..6 {
        let colour = |x: u32, y: u32| image::Rgb([(x * 5) as u8, (y * 3) as u8, 40 * i as u8]);
        let picture = image::RgbImage::from_fn(50, 40, colour);
        let sample = [
            ("caption", Value::Str(format!("a red circle and {i} stars"))),
            ("jpg", Value::Image(encode_jpeg(&picture, 90).unwrap())),
            ("latents_32", Value::f16s(&wave(1, i, 8 * 4 * 4))),
        ];
        writer.write(&sample).unwrap();
    }
    writer.finish().unwrap();

    let case = root.join("tests/golden/dinov2/nitro_resampled");
    let about = std::fs::read(case.join("case.json")).unwrap();
    let about: Json = serde_json::from_slice(&about).unwrap();
    let teacher = folder.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    std::fs::write(teacher.join("config.json"), about["config"].to_string()).unwrap();
    let weights = teacher.join("model.safetensors");
    std::fs::copy(case.join("weights.safetensors"), weights).unwrap();

    let repa = format!(
        "task.repa={{encoder: \"{}\", weight: 0.5}}",
        teacher.display()
    );
    let frozen = format!("task.frozen={}", root.join("models/miniature").display());
    let width = format!("task.model.repa.z_dims=[{}]", about["config"]["embed_dim"]);
    let overrides = [
        "run.max_steps=2",
        "run.sample_every=2",
        "task.model.in_channels=8",
        "task.model.out_channels=8",
        "task.model.caption_channels=128",
        "task.text_tokens=32",
        "task.data.precompute_txt_emb=false",
        "task.data.precompute_dino_feat=false",
        "task.data.scaling_factor=null",
        &repa,
        &frozen,
        &width,
    ];
    let run = folder.path().join("run");
    train(&config(&[&data], &overrides), &run).unwrap();
    assert!(
        numbers(&run, "proj_loss")
            .iter()
            .all(|loss| loss.is_finite())
    );
    let sheet = image::open(run.join("samples/step-00000002.png")).unwrap();
    assert_eq!(
        (sheet.width(), sheet.height()),
        (6 * 32, 32),
        "a picture a caption"
    );
    // A factor that is not the autoencoder's is told.
    let wrong = [&overrides[..], &["task.data.scaling_factor=0.41407"]].concat();
    let error = train(&config(&[&data], &wrong), &run).unwrap_err();
    assert!(error.to_string().contains("scaling_factor"), "{error}");
    assert!(data.join(INDEX).exists());
}
