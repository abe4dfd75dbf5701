//! The command as its users meet it, on the embedded miniature and the golden pipeline's model.

mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use image::{GrayImage, Luma, Rgb, RgbImage};
use nitro::picture::{Parameters, infotext};
use serde_json::Value;
use support::{files_below, golden_model, nitro, said, stderr, stdout};

/// `nitro generate` with the embedded miniature, few steps.
fn generate(home: &Path, arguments: &[&str]) -> Output {
    let output = command(home).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

fn command(home: &Path) -> Command {
    let mut command = nitro(home);
    command.args([
        "generate",
        "a red circle left of a blue square",
        "--steps",
        "2",
    ]);
    command
}

fn picture(path: &Path) -> RgbImage {
    image::open(path).unwrap().into_rgb8()
}

/// Batches of other sizes may round the last bit another way.
fn largest_difference(a: &RgbImage, b: &RgbImage) -> u8 {
    a.as_raw()
        .iter()
        .zip(b.as_raw())
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap()
}

#[test]
fn one_prompt_makes_one_picture_that_knows_how_it_was_made() {
    let home = tempfile::tempdir().unwrap();
    let output = generate(home.path(), &["-o", "out.png", "-s", "7", "-n", "blurry"]);
    assert_eq!(stdout(&output).trim(), "./out.png");
    assert_eq!(files_below(home.path()), [Path::new("out.png")]);
    for stage in ["load", "text", "denoise", "decode", "total"] {
        assert!(stderr(&output).contains(stage), "{}", said(&output));
    }
    let png = std::fs::read(home.path().join("out.png")).unwrap();
    let text = infotext(&png).unwrap().unwrap();
    let settings = Parameters::from_infotext(&text).unwrap();
    assert_eq!(settings.prompt, "a red circle left of a blue square");
    assert_eq!(settings.negative_prompt, "blurry");
    assert_eq!((settings.steps, settings.seed, settings.width), (2, 7, 128));

    // --quiet says nothing, --no-metadata keeps nothing, and the pixels stay.
    let quiet = [
        "-o",
        "plain.png",
        "-s",
        "7",
        "-n",
        "blurry",
        "--no-metadata",
        "--quiet",
    ];
    let output = generate(home.path(), &quiet);
    assert!(
        output.stdout.is_empty() && output.stderr.is_empty(),
        "{}",
        said(&output)
    );
    let plain = home.path().join("plain.png");
    assert_eq!(infotext(&std::fs::read(&plain).unwrap()).unwrap(), None);
    assert_eq!(picture(&plain), picture(&home.path().join("out.png")));
}

#[test]
fn several_pictures_are_numbered_and_each_can_be_made_again_alone() {
    let home = tempfile::tempdir().unwrap();
    let output = generate(
        home.path(),
        &["-N", "3", "-s", "5", "--grid", "-o", "all.png", "--json"],
    );
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["steps"], 2);
    assert_eq!(json["guidance_scale"], 4.5);
    let seeds: Vec<u64> = json["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["seed"].as_u64().unwrap())
        .collect();
    assert_eq!(seeds, [5, 6, 7]);
    for stage in ["load", "text", "denoise", "decode"] {
        assert!(json["seconds"][stage].as_f64().unwrap() >= 0.0);
    }
    let names = ["all-1.png", "all-2.png", "all-3.png", "all.png"].map(Path::new);
    assert_eq!(files_below(home.path()), names);
    assert!(
        picture(&home.path().join("all.png")).width() > 128,
        "the grid is wider"
    );

    generate(home.path(), &["-s", "6", "-o", "second.png"]);
    let [alone, together] = ["second.png", "all-2.png"].map(|f| picture(&home.path().join(f)));
    assert!(
        largest_difference(&alone, &together) <= 1,
        "seed 6 alone makes another picture"
    );
}

#[test]
fn default_names_count_up_and_replace_nothing() {
    let home = tempfile::tempdir().unwrap();
    for seed in ["1", "2"] {
        generate(home.path(), &["-s", seed]);
    }
    let names = ["nitro-0001.png", "nitro-0002.png"].map(Path::new);
    assert_eq!(files_below(home.path()), names);
    assert_ne!(
        picture(&home.path().join(names[0])),
        picture(&home.path().join(names[1]))
    );
}

#[test]
fn cpu_and_cuda_seeds_and_shared_generators_differ() {
    let home = tempfile::tempdir().unwrap();
    generate(home.path(), &["-o", "cpu.png"]);
    generate(home.path(), &["-o", "cuda.png", "--rng", "cuda"]);
    generate(
        home.path(),
        &["-o", "shared.png", "-N", "2", "--one-generator"],
    );
    let load = |name: &str| picture(&home.path().join(name));
    assert_ne!(load("cpu.png"), load("cuda.png"));
    // The first picture of a shared generator is the single picture of that seed; the second goes
    // on in the same stream.
    assert!(largest_difference(&load("shared-1.png"), &load("cpu.png")) <= 1);
    generate(home.path(), &["-o", "next.png", "-s", "1"]);
    assert!(largest_difference(&load("shared-2.png"), &load("next.png")) > 1);
}

#[test]
fn inpainting_keeps_what_the_mask_keeps_and_image_to_image_follows_its_strength() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let image = RgbImage::from_fn(128, 128, |x, y| Rgb([x as u8, y as u8, 90]));
    let mask = GrayImage::from_fn(128, 128, |x, _| Luma([if x < 64 { 255 } else { 0 }]));
    image.save(path("in.png")).unwrap();
    mask.save(path("mask.png")).unwrap();
    let (input, mask) = (path("in.png"), path("mask.png"));
    generate(
        home.path(),
        &[
            "-i",
            &input,
            "--mask",
            &mask,
            "--strength",
            "1",
            "-o",
            "out.png",
        ],
    );
    let out = picture(&home.path().join("out.png"));
    let kept = out.enumerate_pixels().filter(|(x, _, _)| *x >= 64);
    for (x, y, pixel) in kept {
        assert_eq!(pixel, image.get_pixel(x, y));
    }
    let painted = out
        .enumerate_pixels()
        .filter(|(x, y, p)| *x < 64 && *p != image.get_pixel(*x, *y));
    assert!(painted.count() > 1000, "the masked half was not painted");

    // At strength 1 the image is forgotten: the same picture as without it.
    generate(
        home.path(),
        &["-i", &input, "--strength", "1", "-o", "forgot.png"],
    );
    generate(home.path(), &["-o", "plain.png"]);
    assert_eq!(
        picture(&home.path().join("forgot.png")),
        picture(&home.path().join("plain.png"))
    );
    generate(
        home.path(),
        &["-i", &input, "--strength", "0.5", "-o", "half.png"],
    );
    assert_ne!(
        picture(&home.path().join("half.png")),
        picture(&home.path().join("plain.png"))
    );
}

#[test]
fn variants_and_adapters_of_an_official_folder() {
    let home = tempfile::tempdir().unwrap();
    let model = golden_model();
    let lora = model.join("ckpt_grpo_512px");
    let run = |arguments: &[&str]| {
        let mut command = nitro(home.path());
        command.args([
            "generate",
            "a fox",
            "--steps",
            "1",
            "--offline",
            "--json",
            "--model",
        ]);
        let output = command.arg(&model).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_str::<Value>(&stdout(&output)).unwrap()
    };
    let base = run(&["-o", "base.png"]);
    assert_eq!(
        (&base["variant"], &base["guidance_scale"]),
        (&"base".into(), &4.5.into())
    );
    let dist = run(&["-o", "dist.png", "--variant", "dist"]);
    assert_eq!(
        (&dist["width"], &dist["guidance_scale"]),
        (&512.into(), &0.0.into())
    );
    run(&["-o", "grpo.png", "--variant", "grpo"]);
    run(&["-o", "merged.png", "--lora", lora.to_str().unwrap()]);
    run(&["-o", "off.png", "--lora", &format!("{}:0", lora.display())]);
    let load = |name: &str| picture(&home.path().join(name));
    assert_eq!(
        load("grpo.png"),
        load("merged.png"),
        "grpo is base with its adapter"
    );
    assert_ne!(load("grpo.png"), load("base.png"));
    assert_eq!(
        load("off.png"),
        load("base.png"),
        "scale 0 switches an adapter off"
    );
}

#[test]
fn ctrl_c_ends_with_130_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let mut command = nitro(home.path());
    command.args(["generate", "a fox", "--steps", "1000", "-o", "out.png"]);
    let mut child = command
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        files_below(home.path()).is_empty(),
        "{:?}",
        files_below(home.path())
    );
}

#[test]
fn model_info_counts_parameters_tokens_and_operations() {
    let home = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = nitro(home.path())
            .args(["model", "info"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        stdout(&output)
    };
    let model = golden_model();
    let json: Value =
        serde_json::from_str(&run(&[model.to_str().unwrap(), "--json", "--offline"])).unwrap();
    let names: Vec<&str> = json["variants"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["variant"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["base", "grpo", "dist"]);
    let base = &json["variants"][0];
    assert_eq!(base["tokens"], serde_json::json!([256, 80, 256]));
    assert_eq!(
        base["tokens_uncompressed"],
        serde_json::json!([256, 256, 256])
    );
    assert_eq!(base["blocks"], serde_json::json!([4, 16, 4]));
    let gflop = |value: &Value| value.as_f64().unwrap();
    assert!(gflop(&base["part"]["gflop"]) < gflop(&base["gflop_uncompressed"]));
    assert!(json["image_decoder"]["gflop"].as_f64().unwrap() > 0.0);

    let text = run(&["embedded"]);
    for part in [
        "transformer",
        "text encoder",
        "image decoder",
        "compressed",
        "GFLOP",
        "base",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn the_shapes_bench_is_made_scored_and_resumed() {
    let home = tempfile::tempdir().unwrap();
    let run = |steps: &str| {
        let mut command = nitro(home.path());
        command.args(["eval", "shapes", "--limit", "2", "--out", "bench", "--json"]);
        command.args(["--steps", steps]).output().unwrap()
    };
    let output = run("1");
    assert!(output.status.success(), "{}", said(&output));
    let summary: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(summary["images"], 8);
    assert!(summary["overall"].as_f64().is_some());
    let bench = home.path().join("bench");
    for file in [
        "manifest.json",
        "results.jsonl",
        "00000/metadata.jsonl",
        "00001/samples/0003.png",
    ] {
        assert!(bench.join(file).is_file(), "{file} is missing");
    }
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(bench.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["seeds"], serde_json::json!([0, 1, 2, 3]));
    assert_eq!(manifest["checkpoint"].as_str().unwrap().len(), 64);

    // What is there is kept, what is missing is made.
    let (kept, lost) = (bench.join("00000/samples/0002.png"), bench.join("00001"));
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();
    std::fs::remove_dir_all(&lost).unwrap();
    assert!(run("1").status.success());
    assert!(lost.join("samples/0000.png").is_file());
    assert_eq!(
        std::fs::metadata(&kept).unwrap().modified().unwrap(),
        before
    );

    // Pictures of other settings are not mixed in.
    let output = run("2");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        stderr(&output).contains("manifest.json"),
        "{}",
        said(&output)
    );
}

#[test]
fn caches_are_shown_and_cleared_without_touching_other_files() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("packed");
    std::fs::create_dir(&folder).unwrap();
    let own = folder.join("transformer-bf16-0123456789abcdef.safetensors");
    let other = folder.join("model.safetensors");
    std::fs::write(&own, [0; 3000]).unwrap();
    std::fs::write(&other, [0; 10]).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = nitro(home.path());
        command.env("NITRO_PACKED_CACHE", &folder);
        command.env("NITRO_PROMPT_CACHE", "off").arg("cache");
        let output = command.args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        stdout(&output)
    };
    let text = run(&[]);
    assert!(text.contains("text features   switched off"), "{text}");
    assert!(text.contains("packed weights     1 files"), "{text}");
    let json: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json[1]["files"][0]["bytes"], 3000);
    assert_eq!(json[1]["folder"].as_str(), folder.to_str());
    run(&["--clear"]);
    assert!(!own.exists() && other.exists());
    let json: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json[1]["files"].as_array().unwrap().len(), 0);
}

#[test]
fn help_explains_every_command() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, says) in [
        (
            &["--help"][..],
            &["generate", "eval", "model", "Exit codes", "HF_TOKEN"][..],
        ),
        (
            &["generate", "--help"],
            &[
                "--negative-prompt",
                "--strength",
                "--mask",
                "--lora",
                "--rng",
                "--offline",
                "amd/Nitro-E",
            ],
        ),
        (
            &["eval", "shapes", "--help"],
            &["--prompts", "--out", "--limit"],
        ),
        (&["model", "info", "--help"], &["--json"]),
    ] {
        let output = nitro(home.path()).args(arguments).output().unwrap();
        assert!(output.status.success());
        for part in says {
            assert!(
                stdout(&output).contains(part),
                "{part} is missing in {}",
                stdout(&output)
            );
        }
    }
}
