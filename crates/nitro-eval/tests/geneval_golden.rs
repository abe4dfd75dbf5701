//! GenEval's rules and summary against the official scripts' own answers: every case folder under
//! `<NITRO_GOLDEN or tests/golden>/geneval` that holds `cases.json` (scoring) or `results.jsonl`
//! (summary).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use nitro_eval::geneval::{Detections, Metadata, Options, Results, Summary, evaluate_image};
use serde_json::Value;

fn case_folders(marker: &str) -> Vec<PathBuf> {
    let golden = std::env::var_os("NITRO_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
        PathBuf::from,
    );
    let suite = golden.join("geneval");
    let folders: Vec<PathBuf> = std::fs::read_dir(&suite)
        .unwrap_or_else(|e| panic!("{}: {e}", suite.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.join(marker).is_file())
        .collect();
    assert!(
        !folders.is_empty(),
        "no case with {marker} under {}",
        suite.display()
    );
    folders
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn options(defaults: &Value, overrides: &Value) -> Options {
    let number = |key: &str| {
        overrides
            .get(key)
            .or(defaults.get(key))
            .and_then(Value::as_f64)
    };
    let base = Options::default();
    let float = |key: &str, default: f32| number(key).map_or(default, |v| v as f32);
    Options {
        threshold: float("threshold", base.threshold),
        counting_threshold: float("counting_threshold", base.counting_threshold),
        max_objects: number("max_objects").map_or(base.max_objects, |v| v as usize),
        max_overlap: float("max_overlap", base.max_overlap),
        position_threshold: float("position_threshold", base.position_threshold),
    }
}

fn boxes(value: &Value) -> Vec<[f32; 5]> {
    let row = |b: &Value| std::array::from_fn(|i| b[i].as_f64().unwrap() as f32);
    value.as_array().unwrap().iter().map(row).collect()
}

/// A reason's lines as sets of words: where two relations hold, GenEval lists them in the arbitrary
/// order of a Python set.
fn comparable(reason: &str) -> Vec<BTreeSet<&str>> {
    reason
        .lines()
        .map(|line| line.split(' ').collect())
        .collect()
}

#[test]
fn verdicts_are_the_official_ones() {
    for folder in case_folders("cases.json") {
        let config = &json(&folder.join("case.json"))["config"];
        let names: Vec<String> = serde_json::from_value(config["colors"].clone()).unwrap();
        let cases = json(&folder.join("cases.json"));
        for case in cases.as_array().unwrap() {
            let id = &case["id"];
            let metadata = Metadata::parse(&case["metadata"].to_string(), "cases.json").unwrap();
            let options = options(&config["defaults"], &case["options"]);
            let found = case["detections"].as_object().unwrap();
            let detections = Detections(
                found
                    .iter()
                    .map(|(class, b)| (class.clone(), boxes(b)))
                    .collect(),
            );
            let (verdict, kept) =
                evaluate_image(&detections, &metadata, &options, |class, objects| {
                    let logits = &case["color_logits"][class];
                    let best = |index: usize| {
                        let row: Vec<f64> = serde_json::from_value(logits[index].clone()).unwrap();
                        let first =
                            (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b });
                        names[first].clone()
                    };
                    Ok(objects.iter().map(|k| best(k.index)).collect())
                })
                .unwrap();
            let expected = &case["expected"];
            assert_eq!(
                verdict.correct,
                expected["correct"].as_bool().unwrap(),
                "{id}"
            );
            let reason = expected["reason"].as_str().unwrap();
            assert_eq!(comparable(&verdict.reason), comparable(reason), "{id}");
            let kept: BTreeMap<&str, Vec<[f32; 5]>> = kept
                .iter()
                .map(|(c, k)| (c.as_str(), k.iter().map(|k| k.scored).collect()))
                .collect();
            let wanted: BTreeMap<&str, Vec<[f32; 5]>> = expected["kept"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(c, b)| (c.as_str(), boxes(b)))
                .collect();
            assert_eq!(kept, wanted, "{id}");
        }
        println!(
            "{}: {} cases",
            folder.display(),
            cases.as_array().unwrap().len()
        );
    }
}

#[test]
fn summaries_are_the_official_ones() {
    for folder in case_folders("results.jsonl") {
        let results = Results::open(&folder.join("results.jsonl")).unwrap();
        let summary = Summary::of(results.records());
        let expected = json(&folder.join("expected.json"));
        let tolerance = json(&folder.join("case.json"))["tolerance"]["abs"]
            .as_f64()
            .unwrap();
        let close = |actual: f64, key: &Value| {
            assert!(
                (actual - key.as_f64().unwrap()).abs() <= tolerance,
                "{actual} {key}"
            );
        };
        assert_eq!(
            summary.images as u64,
            expected["total_images"].as_u64().unwrap()
        );
        assert_eq!(
            summary.prompts as u64,
            expected["total_prompts"].as_u64().unwrap()
        );
        let share = |part: usize, whole: usize| part as f64 / whole as f64;
        close(
            share(summary.correct_images, summary.images),
            &expected["correct_images"],
        );
        close(
            share(summary.correct_prompts, summary.prompts),
            &expected["correct_prompts"],
        );
        let order: Vec<&str> = summary.tasks.iter().map(|t| t.tag.as_str()).collect();
        assert_eq!(Value::from(order), expected["task_order"]);
        for task in &summary.tasks {
            close(task.share(), &expected["tasks"][&task.tag]);
        }
        close(summary.overall(), &expected["overall"]);
        let stdout = std::fs::read_to_string(folder.join("stdout.txt")).unwrap();
        assert_eq!(summary.to_string().trim_end(), stdout.trim_end());
    }
}
