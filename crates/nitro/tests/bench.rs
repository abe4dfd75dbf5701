//! `nitro bench`: the shape of what it reports. Nothing is said about how long anything takes.

mod support;

use std::ops::ControlFlow;

use nitro::bench::{BenchError, Event, Options, Stage, Suite, run};
use nitro_models::dcae::DcaeConfig;
use nitro_models::dinov2::Dinov2Config;
use nitro_models::emmdit::EmmditConfig;
use nitro_models::llama::LlamaConfig;
use nitro_ops::Precision;
use serde_json::Value;
use support::{nitro, said, stderr, stdout};

/// All parts, small enough for a test: pictures of 64 pixels.
fn small_suite() -> Suite {
    let mut suite = Suite::nitro_e().unwrap();
    let emmdit = EmmditConfig {
        sample_size: 8,
        in_channels: 8,
        out_channels: 8,
        heads: 2,
        head_dim: 16,
        caption_channels: 128,
        pos_embed_max_size: 16,
        block_groups: [1, 1, 1],
        use_sub_attn: false,
        ..EmmditConfig::nitro_e_512()
    };
    suite.text_tokens = 32;
    suite.llama = LlamaConfig {
        num_hidden_layers: 1,
        ..LlamaConfig::miniature(100)
    };
    suite.large_emmdit = EmmditConfig {
        sample_size: 16,
        ..emmdit.clone()
    };
    suite.training.model = emmdit.clone();
    suite.training.text_tokens = 16;
    suite.training.batch = 2;
    suite.emmdit = emmdit;
    suite.dcae = DcaeConfig::miniature();
    suite.dino = Dinov2Config {
        img_size: 28,
        embed_dim: 64,
        depth: 1,
        num_heads: 1,
        ..Dinov2Config::vit_b14()
    };
    suite
}

fn quick(precisions: &[Precision]) -> Options {
    Options {
        precisions: precisions.to_vec(),
        runs: 1,
        warmup: 0,
        per_op: true,
        ..Options::default()
    }
}

/// Checks the fields that programs rely on.
fn check_stage(stage: &Value, name: &str, precision: &str) {
    assert_eq!(stage["name"], name);
    assert_eq!(stage["precision"], precision);
    let computes = name != "load_512";
    for key in ["median_ms", "gflop", "gflops", "percent_of_peak"] {
        if !computes && key != "median_ms" {
            continue;
        }
        let value = stage[key].as_f64();
        assert!(value.is_some_and(|v| v > 0.0), "{key} of {stage}");
    }
    let [low, high] = ["min_ms", "max_ms"].map(|key| stage[key].as_f64().unwrap());
    assert!((low..=high).contains(&stage["median_ms"].as_f64().unwrap()));
}

#[test]
fn every_stage_is_run_in_every_precision_and_reported() {
    let suite = small_suite();
    let options = quick(&[Precision::F32, Precision::Bf16]);
    let mut events = Vec::new();
    let report = run(&suite, &options, &mut |event| {
        events.push(format!("{event:?}"));
        ControlFlow::Continue(())
    })
    .unwrap();
    let json = serde_json::to_value(&report).unwrap();
    let names: Vec<String> = Stage::ALL.iter().map(Stage::to_string).collect();
    let stages = json["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2 * names.len());
    for (i, stage) in stages.iter().enumerate() {
        let precision = ["f32", "bf16"][i / names.len()];
        check_stage(stage, &names[i % names.len()], precision);
        let ops = stage["per_op"].as_array().unwrap();
        let percent: f64 = ops.iter().map(|op| op["percent"].as_f64().unwrap()).sum();
        assert!((percent - 100.0).abs() < 1.0, "{percent} % of {stage}");
        let computes = stage["name"] != "load_512";
        let counted = ops.iter().any(|op| op["gflops"].is_number());
        assert_eq!(counted, computes, "{stage}");
        if ["load_512", "precompute_512"].contains(&stage["name"].as_str().unwrap()) {
            assert!(
                stage["images_per_second"].as_f64().unwrap() > 0.0,
                "{stage}"
            );
        }
    }
    assert!(json["peaks"]["f32"]["all_threads"].as_f64().unwrap() > 0.0);
    assert!(
        json["peaks"]["memory"]["read_all_threads"]
            .as_f64()
            .unwrap()
            > 0.0
    );

    // Guided batches of one picture are two rows of the transformer, and so on.
    let rates = json["images_per_second"].as_array().unwrap();
    let batches = |steps: u64| -> Vec<u64> {
        rates
            .iter()
            .filter(|rate| rate["precision"] == "f32" && rate["steps"] == steps)
            .map(|rate| rate["batch"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(batches(4), [1, 2, 8]);
    assert_eq!(batches(20), [1, 4]);
    let rows = json["table2"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    let parameters: usize = suite.emmdit.parameter_counts().iter().map(|p| p.1).sum();
    for row in rows {
        assert_eq!(row["parameters_m"], parameters as f64 / 1e6);
        assert!(row["latency_ms"].as_f64().unwrap() > 0.0);
    }
    let models = json["models"].as_array().unwrap();
    assert_eq!(models.len(), 2 * 6);
    assert_eq!(models[0]["parameters"], parameters);
    assert!(events.iter().any(|event| event.contains("Loading")));
}

#[test]
fn a_second_start_runs_over_weights_that_were_kept() {
    let options = Options {
        stages: vec!["dcae_decode_512".parse().unwrap()],
        second_start: true,
        ..quick(&[Precision::F32])
    };
    let report = run(&small_suite(), &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    check_stage(&json["stages"][0], "dcae_decode_512", "f32");
    let second = &json["models"][0]["second"];
    assert!(second["load_ms"].as_f64().unwrap() > 0.0, "{second}");
    assert!(second["file_mib"].as_u64().unwrap() > 0, "{second}");
}

#[test]
fn a_bench_can_be_stopped() {
    let stopped = run(
        &small_suite(),
        &quick(&[Precision::F32]),
        &mut |event| match event {
            Event::Running { .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        },
    );
    assert!(matches!(stopped, Err(BenchError::Cancelled)));
}

#[test]
fn the_command_prints_one_json_object() {
    let home = tempfile::tempdir().unwrap();
    let output = nitro(home.path())
        .args([
            "bench",
            "--json",
            "--stages",
            "train_step_mini",
            "--precision",
            "f32",
        ])
        .args(["--runs", "1", "--threads", "1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let stages = json["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 1);
    check_stage(&stages[0], "train_step_mini", "f32");
    assert_eq!(json["machine"]["threads"], 1);
    let peak = &json["peaks"]["f32"];
    assert!(peak["one_thread"].as_f64().unwrap() > 0.0);
}

#[test]
fn unknown_stages_and_precisions_are_refused_with_what_there_is() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, hint) in [
        (["--stages", "dcae_decode_256"], "dcae_decode_512"),
        (["--precision", "fp4"], "bf16"),
        (["--threads", "0"], "1.."),
    ] {
        let output = nitro(home.path())
            .arg("bench")
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(stderr(&output).contains(hint), "{}", said(&output));
    }
}
