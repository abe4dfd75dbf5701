//! Post-training on the shipped miniature, a few steps each: runs resume to the bit, rollouts and
//! training agree to the bit, and what is exported is a variant that the pipeline loads.

use std::path::{Path, PathBuf};

use nitro_models::LoraAdapter;
use nitro_pipeline::{ModelCard, Pipeline, Request};
use nitro_train::TrainError;
use nitro_train::checkpoint::Checkpoint;
use nitro_train::config::RunConfig;
use nitro_train::miniature;
use nitro_train::trainer::RunOptions;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn load(name: &str, overrides: &[&str]) -> RunConfig {
    let mut all = vec![format!(
        "task.model={}",
        root().join("models/miniature").display()
    )];
    all.extend(overrides.iter().map(|o| (*o).to_owned()));
    RunConfig::load(&root().join("configs").join(name), &all).unwrap()
}

fn run(config: &RunConfig, dir: &Path, export: &Path) -> Result<(), TrainError> {
    let options = RunOptions {
        quiet: true,
        stop: None,
        ..RunOptions::default()
    };
    miniature::run(config, dir, export, &options)
}

fn log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

/// A copy of the miniature that knows its base variant alone, to export into.
fn model_folder(place: &Path) -> PathBuf {
    let to = place.join("model");
    copy(&root().join("models/miniature"), &to);
    let path = to.join("nitro.json");
    let text = std::fs::read(&path).unwrap();
    let mut card = ModelCard::parse(&text, "nitro.json").unwrap();
    card.variants.retain(|v| v.name == "base");
    std::fs::write(path, serde_json::to_vec(&card).unwrap()).unwrap();
    to
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        match item.path().is_dir() {
            true => copy(&item.path(), &target),
            false => drop(std::fs::copy(item.path(), target).unwrap()),
        }
    }
}

const GRPO: [&str; 15] = [
    "task.objective={kind: likelihood}",
    "task.noise.level=0.7",
    "task.updates_per_rollout=2",
    "run.batch_size=4",
    "run.warmup_steps=0",
    "run.decay_steps=0",
    "run.sample_every=1",
    "task.groups=2",
    "task.group_size=4",
    "task.steps=3",
    "task.timestep_fraction=0.7",
    "task.lora.rank=4",
    "task.kl_beta=0.01",
    "task.eval.every=0",
    "run.save_every=1",
];

#[test]
fn grpo_agrees_with_its_rollouts_and_resumes_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let export = model_folder(place);
    let with = |steps: &str, extra: &[&str]| {
        load(
            "grpo-miniature.yaml",
            &[&GRPO[..], &[steps], extra].concat(),
        )
    };
    run(&with("run.max_steps=3", &[]), &place.join("whole"), &export).unwrap();
    run(
        &with("run.max_steps=1", &[]),
        &place.join("resumed"),
        &export,
    )
    .unwrap();
    run(
        &with("run.max_steps=3", &[]),
        &place.join("resumed"),
        &export,
    )
    .unwrap();
    let end = |name: &str| Checkpoint::latest(&place.join(name)).unwrap().unwrap().1;
    assert_eq!(end("whole").store, end("resumed").store);
    assert_eq!(end("whole").updates, 6, "two updates of each rollout");

    let lines = log(&place.join("whole"));
    assert_eq!(lines.len(), 3);
    for line in &lines {
        // The first update of a rollout sees the policy that painted it: every ratio is exactly 1.
        assert_eq!(line["on_policy_deviation"], 0.0, "{line}");
        assert!(line["scorers"]["accuracy"]["mean"].is_number());
    }
    assert!(lines[0]["kl"].as_f64().unwrap() >= 0.0);
    assert!(
        lines[2]["kl"].as_f64().unwrap() > 0.0,
        "the policy has left the reference"
    );
    assert!(place.join("whole/samples/step-00000001-best.png").exists());

    // Another run's average is where a further one begins.
    let from = format!("run.init_from={}", place.join("whole").display());
    let still = "run.optimizer.lr=1e-12";
    let further = with("run.max_steps=1", &[from.as_str(), still]);
    run(&further, &place.join("further"), &export).unwrap();
    assert!(log(&place.join("further"))[0]["kl"].as_f64().unwrap() > 1e-12);

    // Without guidance, with the other sampler, in a window: still the same numbers.
    let other = [
        "task.guidance=0",
        "task.noise={kind: cps, level: 0.8}",
        "task.window={size: 2, starts: 1}",
        "task.shared_noise=true",
    ];
    run(
        &with("run.max_steps=2", &other),
        &place.join("other"),
        &export,
    )
    .unwrap();
    for line in log(&place.join("other")) {
        assert_eq!(line["on_policy_deviation"], 0.0, "{line}");
    }

    // On the forward process: other updates, the same resumption.
    let forward = [
        "task.objective={kind: forward, beta: 1.0, levels: [0.4, 1.0], draws: 2}",
        "task.noise.level=0",
        "run.ema_rate=0.5",
    ];
    for (steps, name) in [("2", "forward"), ("1", "again"), ("2", "again")] {
        let steps = format!("run.max_steps={steps}");
        run(&with(&steps, &forward), &place.join(name), &export).unwrap();
    }
    assert_eq!(end("forward").store, end("again").store);
    assert_eq!(end("forward").updates, 8, "two updates of each draw");

    // The adapter is a variant of the model it was exported into.
    assert!(
        LoraAdapter::open(export.join("grpo"))
            .unwrap()
            .names()
            .count()
            > 50
    );
    let text = std::fs::read(export.join("nitro.json")).unwrap();
    let card = ModelCard::parse(&text, "nitro.json").unwrap();
    assert_eq!(card.variant_names(), ["base", "grpo"]);
    let model = export.display().to_string();
    let picture = |variant: &str| {
        let pipeline = Pipeline::builder(model.as_str())
            .variant(variant)
            .load()
            .unwrap();
        let output = pipeline
            .generate(&Request::new("a red circle").steps(2))
            .unwrap();
        output.latents
    };
    assert_ne!(picture("base"), picture("grpo"));
}

#[test]
fn configurations_that_cannot_work_are_refused_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    for (change, says) in [
        ("task.group_size=3", "same batches"),
        ("task.updates_per_rollout=3", "3 updates"),
        ("task.window={size: 3, starts: 2}", "does not fit"),
        (
            "task.lora={rank: 2, alpha: 2, targets: [no.such]}",
            "names no layer",
        ),
        (
            "task.lora={rank: 2, alpha: 2, targets: [pos_embed.proj]}",
            "not a linear layer",
        ),
        ("task.rewards=[]", "nothing to optimise"),
        (
            "task.objective={kind: forward, beta: 1.0, levels: [0.9, 0.4], draws: 2}",
            "two noise levels",
        ),
    ] {
        let config = load("grpo-miniature.yaml", &[&GRPO[..], &[change]].concat());
        let error = run(&config, &place.join("run"), &place.join("out")).unwrap_err();
        assert!(error.to_string().contains(says), "{change}: {error}");
    }
}

const DISTILL: [&str; 9] = [
    "run.batch_size=3",
    "run.warmup_steps=0",
    "run.decay_steps=0",
    "run.save_every=1",
    "run.log_every=1",
    "task.adversarial.start=1",
    "task.adversarial.lead=1",
    "task.simulate=0.5",
    "task.eval={every: 2, prompts: 3, steps: 4, guidance: 0.0}",
];

#[test]
fn distillation_resumes_to_the_bit_with_its_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let export = model_folder(place);
    let pairs = place.join("pairs");
    let pairs_config = format!(
        "task.pairs={{folder: \"{}\", shards: 2, shard_size: 4, steps: 2, guidance: 4.5, batch: 4}}",
        pairs.display()
    );
    let with = |steps: &str| {
        load(
            "distill-miniature.yaml",
            &[&DISTILL[..], &[steps, pairs_config.as_str()]].concat(),
        )
    };
    run(&with("run.max_steps=4"), &place.join("whole"), &export).unwrap();
    // A lost shard is painted again, the same.
    let shard = pairs.join("pairs-00001.safetensors");
    let before = std::fs::read(&shard).unwrap();
    std::fs::remove_file(&shard).unwrap();
    run(&with("run.max_steps=2"), &place.join("resumed"), &export).unwrap();
    assert_eq!(std::fs::read(&shard).unwrap(), before);
    run(&with("run.max_steps=4"), &place.join("resumed"), &export).unwrap();
    let end = |name: &str| Checkpoint::latest(&place.join(name)).unwrap().unwrap().1;
    assert_eq!(end("whole").store, end("resumed").store);

    let lines = log(&place.join("whole"));
    assert!(lines[0]["eval"]["accuracy"].is_number(), "{}", lines[0]);
    let step = |n: u64| {
        lines
            .iter()
            .find(|l| l["step"] == n && l.get("lr").is_some())
            .unwrap()
    };
    assert!(step(1)["discriminator"]["real"]["right"].is_number());
    assert!(step(4)["discriminator"]["misaligned"]["right"].is_number());
    assert_eq!(step(1)["adversarial"], 0.0, "not heard before its start");
    assert!(step(2)["adversarial"].as_f64().unwrap() > 0.0);

    // A student starts as its teacher and nowhere else.
    let elsewhere = ["run.init_from=whole", pairs_config.as_str()];
    let config = load(
        "distill-miniature.yaml",
        &[&DISTILL[..], &elsewhere].concat(),
    );
    let error = run(&config, &place.join("elsewhere"), &export).unwrap_err();
    assert!(
        error.to_string().contains("starts as its teacher"),
        "{error}"
    );

    // Another teacher's pairs are refused, and those that were chosen otherwise.
    let select = pairs_config.replace("batch: 4", "batch: 4, select: {attempts: 2, reward: 1.0}");
    let seed = [pairs_config.as_str(), "run.seed=7"];
    for change in [&seed[..], &[select.as_str()]] {
        let config = load("distill-miniature.yaml", &[&DISTILL[..], change].concat());
        let error = run(&config, &place.join("third"), &export).unwrap_err();
        assert!(error.to_string().contains("another teacher"), "{error}");
    }
    // The best of several pictures of a prompt.
    let best = select.replace("/pairs", "/best");
    let config = load(
        "distill-miniature.yaml",
        &[&DISTILL[..], &[best.as_str(), "run.max_steps=1"]].concat(),
    );
    run(&config, &place.join("best"), &export).unwrap();

    let pipeline = Pipeline::builder(export.display().to_string().as_str())
        .variant("dist")
        .load()
        .unwrap();
    assert_eq!(
        (pipeline.variant().steps, pipeline.variant().guidance),
        (4, 0.0)
    );
    pipeline.generate(&Request::new("a blue star")).unwrap();
}

#[test]
fn adapters_learn_a_folder_of_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let data = place.join("data");
    std::fs::create_dir_all(&data).unwrap();
    for (i, caption) in ["a red ring", "a blue ring"].iter().enumerate() {
        // Nothing the model has seen: wide stripes.
        let colours = [[224, 32, 32], [32, 80, 224]];
        let picture = image::RgbImage::from_fn(200, 160, |x, y| {
            let stripe = if i == 0 { x / 30 } else { y / 30 };
            image::Rgb(colours[stripe as usize % 2])
        });
        picture.save(data.join(format!("{i}.png"))).unwrap();
        std::fs::write(data.join(format!("{i}.txt")), caption).unwrap();
    }
    let with = |steps: &str| {
        let data = format!("task.data={}", data.display());
        let overrides = [
            data.as_str(),
            steps,
            "run.batch_size=4",
            "run.warmup_steps=0",
            "run.optimizer.lr=3e-3",
            "run.sample_every=0",
            "run.log_every=1",
            "run.save_every=4",
            "task.lora={rank: 4, alpha: 4}",
        ];
        load("lora.yaml", &overrides)
    };
    run(
        &with("run.max_steps=12"),
        &place.join("whole"),
        &place.join("adapter"),
    )
    .unwrap();
    run(
        &with("run.max_steps=4"),
        &place.join("resumed"),
        &place.join("other"),
    )
    .unwrap();
    run(
        &with("run.max_steps=12"),
        &place.join("resumed"),
        &place.join("other"),
    )
    .unwrap();
    let bytes = |name: &str| std::fs::read(place.join(name).join("adapter_model.safetensors"));
    assert_eq!(bytes("adapter").unwrap(), bytes("other").unwrap());
    assert!(place.join("adapter/comfyui.safetensors").exists());
    let losses: Vec<f64> = log(&place.join("whole"))
        .iter()
        .filter_map(|line| line["loss"].as_f64())
        .collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[6..]) < 0.7 * mean(&losses[..3]), "{losses:?}");

    std::fs::remove_file(data.join("1.txt")).unwrap();
    let error = run(
        &with("run.max_steps=1"),
        &place.join("bad"),
        &place.join("x"),
    )
    .unwrap_err();
    assert!(error.to_string().contains("1.txt"), "{error}");
}
