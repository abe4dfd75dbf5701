//! `nitro eval geneval`, `hps` and `image-reward` as their users meet them, with the goldens' tiny
//! weights in the place of the official ones.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nitro_models::WeightFiles;
use serde_json::{Value, json};
use support::hub_server::{Behaviour, HubServer};
use support::scorers::{geneval_prompts, tiny_clip, tiny_detector, tiny_image_reward, write};
use support::{files_below, golden, golden_model, nitro, said, stderr, stdout};

fn read_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn eval(home: &Path, benchmark: &str, arguments: &[&str]) -> Command {
    let mut command = nitro(home);
    command.args(["eval", benchmark]).args(arguments);
    command
}

fn run(home: &Path, benchmark: &str, arguments: &[&str]) -> Output {
    let output = eval(home, benchmark, arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

#[test]
fn hps_of_one_picture_is_the_references() {
    let home = tempfile::tempdir().unwrap();
    tiny_clip(&home.path().join("scorer"));
    let case = golden("clip_hps/hps_score");
    let expected = WeightFiles::open(case.join("outputs.safetensors")).unwrap();
    let (_, expected) = expected.read("hps_scores").unwrap();
    let case_json = std::fs::read_to_string(case.join("case.json")).unwrap();
    let inputs = serde_json::from_str::<Value>(&case_json).unwrap()["inputs"].clone();
    for (i, expected) in expected.iter().enumerate() {
        let file = case.join(inputs["files"][i].as_str().unwrap());
        let text = inputs["texts"][i].as_str().unwrap();
        let arguments = [
            "--hps",
            "scorer",
            "--image",
            file.to_str().unwrap(),
            "--prompt",
            text,
        ];
        let said = stdout(&run(home.path(), "hps", &arguments));
        let score: f32 = said.split('\t').next().unwrap().parse().unwrap();
        assert!(
            (score - expected).abs() < 1e-5,
            "{text}: {score} {expected}"
        );
    }
}

#[test]
fn hps_makes_the_official_folders_and_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let path = |file: &str| home.path().join(file);
    tiny_clip(&path("scorer"));
    write(
        &path("prompts/anime.json"),
        &json!(["a red circle", "a blue star", "not asked"]),
    );
    write(
        &path("prompts/photo.json"),
        &json!(["a green ring", "a yellow heart"]),
    );
    let arguments = [
        "--hps",
        "scorer",
        "--prompts",
        "prompts",
        "--limit",
        "2",
        "--steps",
        "1",
    ];
    let first = stdout(&run(home.path(), "hps", &arguments));
    let made: Vec<PathBuf> = files_below(&path("hps"));
    let expected = [
        "anime/00000.jpg",
        "anime/00001.jpg",
        "hps.jsonl",
        "manifest.json",
        "photo/00000.jpg",
        "photo/00001.jpg",
        "scorer.json",
    ];
    assert_eq!(made, expected.map(PathBuf::from));
    let manifest: Value =
        serde_json::from_str(&std::fs::read_to_string(path("hps/manifest.json")).unwrap()).unwrap();
    assert_eq!(
        (&manifest["steps"], &manifest["seeds"]),
        (&json!(1), &json!([0]))
    );
    assert_eq!(manifest["checkpoint"].as_str().unwrap().len(), 64);
    let records = read_lines(&path("hps/hps.jsonl"));
    assert_eq!(records.len(), 4);
    assert_eq!(records[3]["prompt"], "a yellow heart");
    let mean: f64 = records
        .iter()
        .map(|r| r["score"].as_f64().unwrap())
        .sum::<f64>()
        / 4.0;
    assert!(first.contains(&format!("{:.2}", 100.0 * mean)), "{first}");

    // What is lost is made again, the rest is kept.
    let lines = std::fs::read_to_string(path("hps/hps.jsonl")).unwrap();
    let kept: Vec<&str> = lines.lines().take(3).collect();
    std::fs::write(path("hps/hps.jsonl"), kept.join("\n")).unwrap();
    std::fs::remove_file(path("hps/photo/00001.jpg")).unwrap();
    let untouched = std::fs::metadata(path("hps/anime/00000.jpg"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(stdout(&run(home.path(), "hps", &arguments)), first);
    let again = std::fs::metadata(path("hps/anime/00000.jpg"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(untouched, again);

    // Other settings and other scorers need another folder.
    let output = eval(home.path(), "hps", &[&arguments[..], &["-s", "5"]].concat())
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains("manifest.json"),
        "{}",
        said(&output)
    );
    let output = eval(
        home.path(),
        "hps",
        &[&arguments[..], &["--scorer-precision", "bf16"]].concat(),
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("scorer.json"), "{}", said(&output));

    // Pictures made elsewhere are scored without a model.
    let elsewhere = [
        "--hps",
        "scorer",
        "--prompts",
        "prompts",
        "--limit",
        "1",
        "--images",
        "hps",
        "--out",
        "again",
        "--model",
        "/no/such/model",
        "--json",
    ];
    let summary: Value =
        serde_json::from_str(&stdout(&run(home.path(), "hps", &elsewhere))).unwrap();
    let score = 100.0 * records[0]["score"].as_f64().unwrap();
    assert!((summary["styles"][0][2].as_f64().unwrap() - score).abs() < 1e-4);
}

#[test]
fn scorers_and_prompts_come_from_the_hub() {
    let home = tempfile::tempdir().unwrap();
    let path = |file: &str| home.path().join(file);
    tiny_clip(&path("serve/hps"));
    for (i, style) in ["anime", "concept-art", "paintings", "photo"]
        .iter()
        .enumerate()
    {
        let file = path("serve/prompts").join(format!("benchmark/{style}.json"));
        write(&file, &json!([format!("prompt {i}")]));
    }
    let server = HubServer::start(
        [
            ("xswu/HPSv2", path("serve/hps")),
            ("datasets/zhwang/HPDv2", path("serve/prompts")),
        ],
        Behaviour::default(),
    );
    let mut command = eval(home.path(), "hps", &["--steps", "1", "--json"]);
    let output = command
        .env("HF_ENDPOINT", server.address())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let summary: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(summary["styles"].as_array().unwrap().len(), 4);
    drop(server);
    // Everything is in the cache now.
    run(home.path(), "hps", &["--steps", "1", "--offline"]);
}

#[test]
fn image_reward_scores_prompts_and_writes_the_official_results() {
    let home = tempfile::tempdir().unwrap();
    let path = |file: &str| home.path().join(file);
    tiny_image_reward(&path("scorer"));
    let prompts = json!([{ "id": "000904-0035", "prompt": "a red circle" },
        { "id": "000002-0001", "prompt": "a blue star above a ring" }]);
    write(&path("prompts.json"), &prompts);
    let arguments = [
        "--image-reward",
        "scorer",
        "--prompts",
        "prompts.json",
        "-N",
        "2",
        "--steps",
        "1",
    ];
    let first = stdout(&run(home.path(), "image-reward", &arguments));
    let results = path("image-reward/ImageReward-v1.0-benchmark-result.json");
    let text = std::fs::read_to_string(&results).unwrap();
    assert!(
        text.starts_with("[\n    {\n        \"id\": \"000904-0035\""),
        "{text}"
    );
    let results: Value = serde_json::from_str(&text).unwrap();
    let mut means = Vec::new();
    for (result, prompt) in results
        .as_array()
        .unwrap()
        .iter()
        .zip(prompts.as_array().unwrap())
    {
        assert_eq!(
            (&result["id"], &result["prompt"]),
            (&prompt["id"], &prompt["prompt"])
        );
        let rewards: Vec<f64> = result["rewards"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r.as_f64().unwrap())
            .collect();
        assert_eq!(rewards.len(), 2);
        assert!(rewards[0] != rewards[1], "two pictures, two rewards");
        let mean = result["mean_score"].as_f64().unwrap();
        assert!((mean - rewards.iter().sum::<f64>() / 2.0).abs() < 1e-6);
        means.push(mean);
    }
    let score = means.iter().sum::<f64>() / 2.0;
    assert_eq!(first.trim(), format!("ImageReward {score:.4} (2 prompts)"));
    assert!(path("image-reward/000002-0001_1.png").is_file());
    assert_eq!(stdout(&run(home.path(), "image-reward", &arguments)), first);

    let picture = path("image-reward/000904-0035_0.png");
    let alone = [
        "--image-reward",
        "scorer",
        "--image",
        picture.to_str().unwrap(),
        "--prompt",
        "a red circle",
    ];
    let alone = stdout(&run(home.path(), "image-reward", &alone));
    let reward: f64 = alone.split('\t').next().unwrap().parse().unwrap();
    assert!(
        (reward - results[0]["rewards"][0].as_f64().unwrap()).abs() < 1e-4,
        "{alone}"
    );
}

#[test]
fn geneval_judges_with_detector_and_colours() {
    let home = tempfile::tempdir().unwrap();
    let path = |file: &str| home.path().join(file);
    tiny_detector(&path("detector"));
    tiny_clip(&path("clip"));
    geneval_prompts(&path("prompts.jsonl"));
    let model = golden_model();
    let arguments = [
        "--prompts",
        "prompts.jsonl",
        "--detector",
        "detector",
        "--clip",
        "clip",
        "--model",
        model.to_str().unwrap(),
        "--steps",
        "1",
    ];
    let first = stdout(&run(home.path(), "geneval", &arguments));
    assert!(
        first.contains("Total images: 8\nTotal prompts: 2\n"),
        "{first}"
    );
    assert!(first.contains("Overall score (avg. over tasks)"), "{first}");
    for file in [
        "00000/metadata.jsonl",
        "00001/samples/0003.png",
        "00000/grid.png",
        "manifest.json",
        "scorer.json",
        "results-without-duplicates.jsonl",
    ] {
        assert!(path("geneval").join(file).is_file(), "{file}");
    }
    let records = read_lines(&path("geneval/results.jsonl"));
    assert_eq!(records.len(), 8);
    let keys: Vec<&String> = records[0].as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "filename", "tag", "prompt", "correct", "reason", "metadata", "details"
        ]
    );
    let scorers: Value =
        serde_json::from_str(&std::fs::read_to_string(path("geneval/scorer.json")).unwrap())
            .unwrap();
    assert_eq!(scorers["weights"].as_object().unwrap().len(), 2);

    // A second run finds everything done: it would fail if it made a picture again.
    std::fs::write(
        path("geneval/00000/samples/0000.png"),
        b"no longer a picture",
    )
    .unwrap();
    assert_eq!(stdout(&run(home.path(), "geneval", &arguments)), first);

    // The official script's conditions are not met by two prompts.
    let strict = [
        "--strict-official",
        "--images",
        "geneval",
        "--detector",
        "detector",
        "--clip",
        "clip",
    ];
    let output = eval(home.path(), "geneval", &strict).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(stderr(&output).contains("553"), "{}", said(&output));
}

#[test]
fn dpg_pictures_are_squares_of_four() {
    let home = tempfile::tempdir().unwrap();
    let said = stdout(&run(home.path(), "dpg", &["--limit", "2", "--steps", "1"]));
    assert!(said.contains("--resolution 128"), "{said}");
    let images = home.path().join("dpg/images");
    assert_eq!(files_below(&images), ["0.png", "1.png"].map(PathBuf::from));
    let sheet = image::open(images.join("1.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (256, 256));
    run(home.path(), "dpg", &["--limit", "2", "--steps", "1"]);
}

#[test]
fn what_is_missing_is_named() {
    let home = tempfile::tempdir().unwrap();
    let path = |file: &str| home.path().join(file);
    let output = eval(home.path(), "hps", &["--hps", "/no/such/folder"])
        .output()
        .unwrap();
    let error = stderr(&output);
    assert!(
        error.contains("/no/such/folder") && error.contains("HPS_v2.1_compressed.pt"),
        "{error}"
    );
    let output = eval(home.path(), "image-reward", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    // Weights of another model.
    tiny_detector(&path("detector"));
    let output = eval(home.path(), "hps", &["--hps", "detector"])
        .output()
        .unwrap();
    assert!(
        stderr(&output).contains("logit_scale") || stderr(&output).contains("visual"),
        "{}",
        said(&output)
    );
}
