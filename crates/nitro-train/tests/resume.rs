//! A run that was stopped and resumed ends with the same bits as one that was not; configurations of
//! the repository are read; a changed run is refused.

use std::path::{Path, PathBuf};

use nitro_models::WeightFiles;
use nitro_train::TrainError;
use nitro_train::checkpoint::Checkpoint;
use nitro_train::config::{DataConfig, RunConfig, TaskConfig};
use nitro_train::miniature::{self, LatentsPlan};
use nitro_train::trainer::RunOptions;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

fn load(name: &str, overrides: &[&str]) -> RunConfig {
    let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
    RunConfig::load(&configs().join(name), &overrides).unwrap()
}

fn quiet() -> RunOptions {
    RunOptions {
        quiet: true,
        ..RunOptions::default()
    }
}

const TINY_AUTOENCODER: [&str; 9] = [
    "run.batch_size=2",
    "run.warmup_steps=2",
    "run.decay_steps=0",
    "run.save_every=2",
    "run.sample_every=0",
    "task.image_size=32",
    "task.crop_size=16",
    "task.full_size_steps=0",
    "run.log_every=1",
];

#[test]
fn resuming_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let run = |dir: &str, steps: &str| {
        let overrides = [&TINY_AUTOENCODER[..], &[steps]].concat();
        let config = load("miniature-autoencoder.yaml", &overrides);
        let dir = folder.path().join(dir);
        miniature::run(&config, &dir, &dir.join("export"), &quiet()).unwrap();
        dir
    };
    let whole = run("whole", "run.max_steps=5");
    run("resumed", "run.max_steps=3");
    let resumed = run("resumed", "run.max_steps=5");
    let (_, whole) = Checkpoint::latest(&whole).unwrap().unwrap();
    let (_, resumed) = Checkpoint::latest(&resumed).unwrap().unwrap();
    assert_eq!((whole.step, resumed.step), (5, 5));
    assert_eq!(whole.store, resumed.store);

    let log = std::fs::read_to_string(folder.path().join("whole/metrics.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 5, "one line a step");
}

#[test]
fn another_run_under_the_same_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, export) = (folder.path().join("run"), folder.path().join("export"));
    let with = |extra: &[&str]| {
        let overrides = [&TINY_AUTOENCODER[..], extra].concat();
        load("miniature-autoencoder.yaml", &overrides)
    };
    miniature::run(&with(&["run.max_steps=2"]), &dir, &export, &quiet()).unwrap();
    let changed = with(&["run.max_steps=4", "run.optimizer.lr=0.5"]);
    let error = miniature::run(&changed, &dir, &export, &quiet()).unwrap_err();
    assert!(matches!(error, TrainError::Resume { .. }), "{error}");
    assert!(error.to_string().contains("optimizer"), "{error}");
    let kept = std::fs::read_to_string(dir.join("config.json")).unwrap();
    assert!(kept.contains("0.001"), "a refused run has changed nothing");
    let starts = std::fs::read_to_string(dir.join("starts.jsonl")).unwrap();
    assert_eq!(starts.lines().count(), 1);
}

#[test]
fn lines_of_steps_done_again_are_dropped_from_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let run = |steps: &str| {
        let overrides = [&TINY_AUTOENCODER[..], &[steps]].concat();
        let config = load("miniature-autoencoder.yaml", &overrides);
        miniature::run(&config, &dir, &dir.join("export"), &quiet()).unwrap();
    };
    run("run.max_steps=2");
    // As a process leaves it that was killed after logging what no checkpoint holds.
    let log = dir.join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&log).unwrap();
    text += "{\"step\":3,\"loss\":9.0}\n{\"step\":4,\"lo";
    std::fs::write(&log, text).unwrap();
    run("run.max_steps=4");
    let text = std::fs::read_to_string(&log).unwrap();
    let steps: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    assert!(!text.contains("\"loss\":9.0}"));
    let events = std::fs::read_dir(dir.join("tensorboard")).unwrap().count();
    assert_eq!(events, 2, "one event file a start");
}

#[test]
fn what_cannot_be_written_is_told_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a-file");
    std::fs::write(&file, "not a folder").unwrap();
    let overrides = [&TINY_AUTOENCODER[..], &["run.max_steps=1"]].concat();
    let config = load("miniature-autoencoder.yaml", &overrides);
    let dir = file.join("run");
    let error = miniature::run(&config, &dir, &dir, &quiet()).unwrap_err();
    assert!(matches!(error, TrainError::Io { .. }), "{error}");
    assert!(error.to_string().contains("a-file"), "{error}");
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let place = to.join(item.file_name());
        match item.path().is_dir() {
            true => copy_folder(&item.path(), &place),
            false => drop(std::fs::copy(item.path(), place).unwrap()),
        }
    }
}

/// Every part of the miniature, each a few steps long, from nothing to a model folder.
#[test]
fn the_whole_recipe_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (out, runs) = (folder.path().join("model"), folder.path().join("runs"));
    let short = [
        "run.max_steps=2",
        "run.batch_size=2",
        "run.save_every=2",
        "run.log_every=1",
    ];
    let with = |name: &str, extra: &[&str]| load(name, &[&short[..], extra].concat());
    let autoencoder = with("miniature-autoencoder.yaml", &["run.sample_every=2"]);
    let text = ["task.tokenizer_captions=500", "task.vocab_size=300"];
    let text_encoder = with("miniature-text-encoder.yaml", &text);
    miniature::run(&autoencoder, &runs.join("autoencoder"), &out, &quiet()).unwrap();
    miniature::run(&text_encoder, &runs.join("text-encoder"), &out, &quiet()).unwrap();
    assert!(runs.join("autoencoder/samples/step-00000002.png").exists());

    let latents = runs.join("latents");
    let plan = LatentsPlan {
        shards: 1,
        image_size: 128,
        seed: 0,
    };
    let precision = nitro_ops::Precision::Bf16;
    miniature::cache_latents(&out, &latents, plan, precision, &quiet()).unwrap();

    let tiny = ["task.model.img_size=32", "task.model.patch_size=2"];
    let small = [
        "task.model.embed_dim=32",
        "task.model.num_heads=2",
        "run.sample_every=2",
    ];
    let teacher = with("miniature-teacher.yaml", &[&tiny[..], &small].concat());
    miniature::run(&teacher, &runs.join("teacher"), &runs, &quiet()).unwrap();
    assert!(runs.join("teacher/samples/step-00000002.png").exists());
    let encoder = WeightFiles::open(runs.join("visual_encoder/model.safetensors")).unwrap();
    assert!(encoder.names().all(|name| !name.starts_with("heads")));

    let place = |config: &mut RunConfig| {
        if let TaskConfig::Emmdit(task) = &mut config.task {
            task.data = DataConfig::Latents {
                folder: latents.clone(),
            };
            task.frozen = Some(out.clone());
            if let Some(repa) = &mut task.repa {
                repa.encoder = Some(runs.join("visual_encoder"));
            }
        }
    };
    let scored = [
        "run.sample_every=2",
        "run.score_every=2",
        "task.score_prompts=2",
    ];
    let mut stage1 = with("miniature-stage1.yaml", &scored);
    place(&mut stage1);
    let wide = miniature::run(&stage1, &runs.join("wide"), &out, &quiet()).unwrap_err();
    assert!(wide.to_string().contains("z_dims: [32]"), "{wide}");
    if let TaskConfig::Emmdit(task) = &mut stage1.task {
        task.model.repa.as_mut().unwrap().z_dims = vec![32];
    }
    miniature::run(&stage1, &runs.join("stage1"), &runs.join("first"), &quiet()).unwrap();
    assert!(runs.join("stage1/samples/step-00000002.png").exists());
    let log = std::fs::read_to_string(runs.join("stage1/metrics.jsonl")).unwrap();
    assert!(log.contains("\"proj_loss\":"), "{log}");
    assert!(log.contains("{\"step\":0,\"score\":"), "{log}");
    assert!(runs.join("stage1/checkpoints/best.safetensors").exists());

    // Other data under the same run is refused.
    let mut other = stage1.clone();
    {
        let text = out.join("text_encoder/tokenizer.json");
        let frozen = folder.path().join("other");
        copy_folder(&out, &frozen);
        let tokenizer = std::fs::read_to_string(text).unwrap() + " ";
        std::fs::write(frozen.join("text_encoder/tokenizer.json"), tokenizer).unwrap();
        std::fs::rename(&out, folder.path().join("aside")).unwrap();
        std::fs::rename(&frozen, &out).unwrap();
    }
    other.run.max_steps = 4;
    let refused = miniature::run(&other, &runs.join("stage1"), &out, &quiet()).unwrap_err();
    assert!(refused.to_string().contains("tokenizer"), "{refused}");
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::rename(folder.path().join("aside"), &out).unwrap();

    // The second stage starts from the first one's average, its projectors left behind.
    let mut stage2 = with(
        "miniature-stage2.yaml",
        &["run.optimizer.lr=0.0", "run.score_every=0"],
    );
    place(&mut stage2);
    stage2.run.init_from = Some(runs.join("stage1"));
    miniature::run(&stage2, &runs.join("stage2"), &out, &quiet()).unwrap();
    let (_, first) = Checkpoint::latest(&runs.join("stage1")).unwrap().unwrap();
    let (_, second) = Checkpoint::latest(&runs.join("stage2")).unwrap().unwrap();
    assert!(first.store.get("projectors.0.0.weight").is_some());
    assert!(second.store.get("projectors.0.0.weight").is_none());
    for (name, entry) in second.store.iter() {
        let before = first.store.get(name).unwrap().averaged();
        assert_eq!(
            entry.value, before,
            "{name}: a learning rate of zero changes nothing"
        );
    }
    for file in [
        "transformer.safetensors",
        "dc-ae/config.json",
        "dc-ae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/tokenizer.json",
    ] {
        assert!(out.join(file).exists(), "{file}");
    }
}

#[test]
fn unknown_keys_are_told() {
    let overrides = ["run.learning_rate=1".to_owned()];
    let path = configs().join("miniature-stage1.yaml");
    let error = RunConfig::load(&path, &overrides).unwrap_err();
    assert!(error.to_string().contains("run.learning_rate"), "{error}");
}
