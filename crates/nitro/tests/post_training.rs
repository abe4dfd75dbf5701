//! The post-training commands as a user meets them: adapters from a folder of pictures to a picture,
//! the table from nothing to its last row, and what is said when something does not fit.

mod support;

use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use nitro_eval::shapes::shapes_bench;
use serde_json::Value;
use support::{nitro, said, stderr, stdout};

fn miniature() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/miniature")
}

#[test]
fn adapters_go_from_a_folder_of_pictures_into_a_picture() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir_all(&data).unwrap();
    for i in 0..2_u8 {
        let picture = RgbImage::from_pixel(140, 128, Rgb([i * 200, 90, 40]));
        picture.save(data.join(format!("{i}.jpg"))).unwrap();
        std::fs::write(data.join(format!("{i}.txt")), "a flat wall").unwrap();
    }
    let output = nitro(home.path())
        .args(["train", "--lora", "-q", "--data", "data", "--out", "lora"])
        .args(["--trigger", "zorb", "--model"])
        .arg(miniature())
        .args(["run.max_steps=2", "run.batch_size=2", "run.sample_every=2"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(stdout(&output).contains("--lora lora"), "{}", said(&output));
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "comfyui.safetensors",
        "training/metrics.jsonl",
        "training/samples/step-00000002.png",
    ] {
        assert!(home.path().join("lora").join(file).exists(), "{file}");
    }
    let output = nitro(home.path())
        .args([
            "generate",
            "zorb a flat wall",
            "--steps",
            "2",
            "-o",
            "out.png",
        ])
        .args(["--lora", "lora:0.5", "--lora", "lora:-0.5"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(home.path().join("out.png").exists());
}

#[test]
fn what_does_not_fit_is_told_before_anything_is_trained() {
    let home = tempfile::tempdir().unwrap();
    let model = miniature().display().to_string();
    let cases: [(&[&str], &str); 4] = [
        (&["lora", "--data", "none", "--out", "x"], "no such folder"),
        (
            &["grpo", "--model", &model, "task.group_size=7"],
            "same batches",
        ),
        (
            &["grpo", "--model", &model, "task.group=7"],
            "no key `task.group`",
        ),
        (
            &["distill", "--model", "org/model-on-the-hub"],
            "name one for the new variant with --export",
        ),
    ];
    for (arguments, says) in cases {
        let output = nitro(home.path())
            .arg("train")
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(stderr(&output).contains(says), "{}", said(&output));
    }
}

#[test]
fn the_table_is_made_from_nothing() {
    let home = tempfile::tempdir().unwrap();
    let config = miniature().join("../../configs/miniature-preference.yaml");
    let output = nitro(home.path())
        .args(["train", "run", config.to_str().unwrap(), "-q"])
        .args(["--dir", "training", "--export", "."])
        .args(["run.max_steps=1", "run.batch_size=2", "run.sample_every=0"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let reproduce = || {
        let grpo = [
            "run.max_steps=1",
            "run.batch_size=4",
            "task.groups=2",
            "task.group_size=4",
            "task.steps=2",
            "task.window=null",
            "task.eval.every=0",
        ];
        let distill = [
            "run.max_steps=1",
            "run.batch_size=2",
            "task.pairs.shards=1",
            "task.pairs.shard_size=4",
            "task.pairs.batch=4",
            "task.pairs.steps=2",
            "task.eval.every=0",
        ];
        let mut command = nitro(home.path());
        command.args(["reproduce", "table2", "-q", "--every", "120", "--model"]);
        command.arg(miniature());
        command.args(["--hps", "preference"]);
        for o in grpo {
            command.args(["--grpo", o, "--grpo-hps", o]);
        }
        for o in distill {
            command.args(["--distill", o]);
        }
        command.output().unwrap()
    };
    let first = reproduce();
    assert!(first.status.success(), "{}", said(&first));
    let runs = home.path().join("runs/table2");
    let table = std::fs::read_to_string(runs.join("table2.md")).unwrap();
    for row in [
        "miniature base | 20",
        "miniature grpo | 20",
        "miniature dist | 4",
    ] {
        assert!(table.contains(row), "{table}");
    }
    let rows = std::fs::read_to_string(runs.join("table2.json")).unwrap();
    let rows: Value = serde_json::from_str(&rows).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 3);
    assert!(rows[2]["hps"].is_number(), "{rows}");
    // Started again, it trains and paints nothing anew.
    let log = |run: &str| std::fs::read_to_string(runs.join(run).join("metrics.jsonl")).unwrap();
    assert!(log("grpo-hps").contains("\"hps\""), "rewarded as well");
    let before = ["grpo", "grpo-hps", "dist"].map(log);
    let again = reproduce();
    assert!(again.status.success(), "{}", said(&again));
    assert_eq!(["grpo", "grpo-hps", "dist"].map(log), before);
}

#[test]
fn the_shipped_variants_paint_what_is_asked_for() {
    let home = tempfile::tempdir().unwrap();
    // Two prompts of each task.
    let prompts: Vec<String> = shapes_bench()
        .iter()
        .step_by(20)
        .map(|p| p.metadata.to_json())
        .collect();
    assert_eq!(prompts.len(), 12);
    std::fs::write(home.path().join("prompts.jsonl"), prompts.join("\n")).unwrap();
    // The model card promises 0.80 and more of the whole bench.
    for (variant, steps, guidance) in [("base", 20, 4.5), ("grpo", 20, 4.5), ("dist", 4, 0.0)] {
        let output = nitro(home.path())
            .args(["eval", "shapes", "--prompts", "prompts.jsonl", "--json"])
            .args(["--variant", variant, "--out", variant])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let summary: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(summary["images"], 48);
        let overall = summary["overall"].as_f64().unwrap();
        assert!(overall >= 0.65, "{variant}: {summary}");
        let manifest = std::fs::read(home.path().join(variant).join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest["steps"], steps);
        assert_eq!(manifest["guidance"], guidance);
    }
}
