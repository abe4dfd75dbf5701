//! From pictures to a trained E-MMDiT by the command alone, and what happens when the disk, the folder,
//! the configuration or the data are not what they should be.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nitro_data::image::encode_jpeg;
use safetensors::SafeTensors;
use serde_json::Value;
use support::{files_below, nitro, said, stderr, stdout};

/// A tiny E-MMDiT on 32 px pictures under the miniature's autoencoder and text encoder.
const CONFIG: &str = "
run:
  seed: 3
  max_steps: 24
  batch_size: 4
  optimizer: { lr: 1.0e-3, weight_decay: 3.0e-2, eps: 1.0e-10, betas: [0.9, 0.999] }
  warmup_steps: 2
  gradient_clip: 0.5
  ema_rate: 0.9
  precision: f32
  save_every: 3
  log_every: 1
  sample_every: 0
task:
  kind: emmdit
  model:
    sample_size: 4
    in_channels: 8
    out_channels: 8
    heads: 4
    head_dim: 16
    caption_channels: 128
    pos_embed_max_size: 4
    block_groups: [1, 2, 1]
    use_sub_attn: false
    repa: null
  data:
    kind: mds
    datasets: [features]
    precompute_txt_emb: true
    scaling_factor: 0.9
  text_tokens: 32
  caption_dropout: 0.1
";

fn run(home: &Path, arguments: &[&str]) -> Output {
    nitro(home).args(arguments).output().unwrap()
}

fn done(home: &Path, arguments: &[&str]) -> Output {
    let output = run(home, arguments);
    assert!(output.status.success(), "{}", said(&output));
    output
}

/// `nitro train run` of the configuration in `dir`, with overrides.
fn training<'a>(dir: &'a str, overrides: &[&'a str]) -> Vec<&'a str> {
    let begin = ["train", "run", "--quiet", "config.yaml", "--dir", dir];
    [&begin[..], &["--export", "export"], overrides].concat()
}

/// A home with pictures turned into features, and the configuration.
fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let photos = home.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for i in 0..11 {
        let colour = move |x: u32, y: u32| image::Rgb([(x * 5) as u8, (y * 4) as u8, 20 * i as u8]);
        let picture = image::RgbImage::from_fn(48, 40, colour);
        let name = photos.join(format!("{i:02}"));
        let jpeg = encode_jpeg(&picture, 90).unwrap();
        fs::write(name.with_extension("jpg"), jpeg).unwrap();
        let caption = format!("a red circle and {i} stars");
        fs::write(name.with_extension("txt"), caption).unwrap();
    }
    done(
        home.path(),
        &["data", "ingest", "folder", "photos", "--out", "set"],
    );
    let precompute = [
        "data",
        "precompute",
        "set",
        "--out",
        "features",
        "--size",
        "32",
    ];
    let columns = ["--latents", "--text", "--keep-pictures"];
    done(home.path(), &[&precompute[..], &columns].concat());
    fs::write(home.path().join("config.yaml"), CONFIG).unwrap();
    home
}

fn log(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn last_checkpoint(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("checkpoints/step-00000024.safetensors")).unwrap()
}

/// Everything below `dir` with its bytes.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files_below(dir)
        .into_iter()
        .map(|path| (path.clone(), fs::read(dir.join(path)).unwrap()))
        .collect()
}

#[test]
fn pictures_become_a_model() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    assert!(at("features/null_emb.safetensors").exists());
    let plan = ["train", "run", "config.yaml", "--dry-run"];
    let plan: Value = serde_json::from_str(&stdout(&done(home.path(), &plan))).unwrap();
    assert_eq!(plan["emmdit"]["examples"], 11, "{plan}");
    // As in StreamingDataset, each of 64 canonical nodes has at least one sample.
    assert_eq!(plan["emmdit"]["steps_per_epoch"], 16, "{plan}");
    assert_eq!(plan["config"]["task"]["data"]["shuffle_seed"], 9176);
    assert!(!at("export").exists());

    done(home.path(), &training("run", &[]));
    assert!(at("export/transformer.safetensors").exists());
    assert_eq!(log(&at("run")).len(), 24);
    let official = ["train", "export", "run", "-o", "model.safetensors"];
    done(home.path(), &official);
    // The second stage goes on from the first, whose learning rate and length are others.
    let second = [
        "run.init_from=run",
        "run.max_steps=2",
        "run.ema_rate=0.9999",
    ];
    done(home.path(), &training("second", &second));

    // Captions encoded as they come are nearly the same training: the columns are float16.
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/miniature");
    let frozen = format!("task.frozen={}", models.display());
    let online = [
        "task.data.precompute_txt_emb=false",
        "task.data.scaling_factor=null",
        "run.max_steps=1",
        &frozen,
    ];
    done(home.path(), &training("online", &online));
    let config = fs::read_to_string(models.join("dc-ae/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let scale = format!("task.data.scaling_factor={}", config["scaling_factor"]);
    done(
        home.path(),
        &training("stored", &["run.max_steps=1", &scale]),
    );
    let loss = |dir: &str| log(&at(dir))[0]["loss"].as_f64().unwrap();
    let (online, stored) = (loss("online"), loss("stored"));
    assert!((online - stored).abs() < 1e-3 * stored, "{online} {stored}");
}

#[test]
fn a_run_on_shards_killed_again_and_again_ends_with_the_same_bits() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    done(home.path(), &training("alone", &[]));
    // Killed when the log has come so far: in the first epoch, at the end of one, in a later one.
    for lines in [2, 4, 5, 9, 14, 19] {
        let mut child = nitro(home.path())
            .args(training("killed", &[]))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let seen = || fs::read_to_string(at("killed/metrics.jsonl")).unwrap_or_default();
        while seen().lines().count() < lines
            && child.try_wait().unwrap().is_none()
            && begun.elapsed() < Duration::from_secs(60)
        {
            std::thread::sleep(Duration::from_micros(200));
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    done(home.path(), &training("killed", &[]));
    assert!(last_checkpoint(&at("alone")) == last_checkpoint(&at("killed")));
    let losses = |dir: &str| -> Vec<Value> {
        log(&at(dir))
            .iter()
            .map(|line| line["loss"].clone())
            .collect()
    };
    assert_eq!(losses("alone"), losses("killed"));
    let starts = fs::read_to_string(at("killed/starts.jsonl")).unwrap();
    assert!(starts.lines().count() > 1, "it was never killed in time");
}

#[test]
fn a_full_disk_loses_nothing_that_was_written() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    done(home.path(), &training("alone", &[]));
    let size = last_checkpoint(&at("alone")).len();

    // Files may not grow beyond half a checkpoint: the system refuses as a full disk does.
    let limited = |kilobytes: usize, arguments: &[&str]| {
        let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_nitro")]);
        command.args(arguments).current_dir(home.path());
        command.output().unwrap()
    };
    done(home.path(), &training("run", &["run.max_steps=3"]));
    let before = fs::read(at("run/checkpoints/step-00000003.safetensors")).unwrap();
    let output = limited(size / 2048, &training("run", &[]));
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let told = stderr(&output);
    assert!(told.contains("step-00000006.safetensors"), "{told}");
    assert!(
        told.contains("disk is full") && told.contains("MB"),
        "{told}"
    );
    let kept = files_below(&at("run/checkpoints"));
    assert_eq!(kept, [PathBuf::from("step-00000003.safetensors")]);
    let after = fs::read(at("run/checkpoints/step-00000003.safetensors")).unwrap();
    assert!(before == after);
    // With space again, the run ends as if nothing had been.
    done(home.path(), &training("run", &[]));
    assert!(last_checkpoint(&at("run")) == last_checkpoint(&at("alone")));

    // The same on a disk that is really full, where a test may mount one.
    let script = "mkdir disk && mount -t tmpfs -o size=$0 tmpfs disk || exit 77; \"$@\"; code=$?; \
                  find disk -name '*.safetensors' -exec cp {} kept/ \\; ; exit $code";
    fs::create_dir(at("kept")).unwrap();
    let mut command = Command::new("unshare");
    // Room for the two checkpoints that are kept, not for the third beside them.
    command.args(["-Urm", "bash", "-c", script, &(5 * size / 2).to_string()]);
    command.arg(env!("CARGO_BIN_EXE_nitro"));
    command
        .args(training("disk/run", &[]))
        .current_dir(home.path());
    match command.output() {
        Ok(output) if output.status.code() == Some(1) && stderr(&output).contains("disk/run") => {
            let told = stderr(&output);
            assert!(told.contains("disk is full"), "{told}");
            let mut kept = files_below(&at("kept"));
            kept.sort();
            let whole = ["step-00000003.safetensors", "step-00000006.safetensors"];
            assert_eq!(kept, whole.map(PathBuf::from));
            for name in whole {
                let bytes = fs::read(at("kept").join(name)).unwrap();
                let whole = SafeTensors::deserialize(&bytes);
                assert!(whole.is_ok(), "{name}: {:?}", whole.err());
            }
        }
        Ok(output) if output.status.code() == Some(0) => panic!("{}", said(&output)),
        refused => println!("skipped: no mount here: {refused:?}"),
    }
}

#[test]
fn folders_that_cannot_be_written_are_told_before_the_work() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    fs::write(at("a-file"), "in the way").unwrap();
    let closed = at("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    let open_to_root = fs::write(closed.join("probe"), "").is_ok();
    if open_to_root {
        println!("skipped: root writes into closed folders");
        fs::remove_file(closed.join("probe")).unwrap();
    }
    let run = |dir: &str, export: &str| {
        let begin = ["train", "run", "--quiet", "config.yaml"];
        run(
            home.path(),
            &[&begin[..], &["--dir", dir, "--export", export]].concat(),
        )
    };
    let mut cases = vec![
        ("a-file/run", "export", "a-file/run"),
        ("run", "a-file", "a-file"),
    ];
    if !open_to_root {
        cases.push(("closed/run", "export", "closed/run"));
        cases.push(("run", "closed/export", "closed/export"));
    }
    for (dir, export, named) in cases {
        let output = run(dir, export);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(stderr(&output).contains(named), "{}", said(&output));
        assert!(!at("run").exists() && !at("export").exists(), "{named}");
    }
}

#[test]
fn another_configuration_or_other_data_are_refused_before_any_damage() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    done(home.path(), &training("run", &["run.max_steps=6"]));
    fs::remove_dir_all(at("export")).unwrap();
    let before = contents(&at("run"));
    let refused = |overrides: &[&str], named: &str| {
        let output = run(home.path(), &training("run", overrides));
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        let told = stderr(&output);
        assert!(told.contains("cannot be resumed"), "{told}");
        assert!(told.contains(named), "{told}");
        assert!(told.contains("another folder"), "{told}");
        assert!(
            before == contents(&at("run")),
            "{named}: the run was touched"
        );
        assert!(!at("export").exists(), "{named}");
    };
    refused(&["run.optimizer.lr=1"], "optimizer");
    refused(&["run.seed=4"], "seed");
    refused(&["run.batch_size=8"], "batch_size");
    refused(&["task.model.heads=8", "task.model.head_dim=8"], "heads");
    refused(&["task.caption_dropout=0.5"], "caption_dropout");
    // The data are other ones under the same name: one sample less.
    fs::rename(at("features"), at("aside")).unwrap();
    fs::remove_file(at("photos/00.jpg")).unwrap();
    done(
        home.path(),
        &["data", "ingest", "folder", "photos", "--out", "less"],
    );
    let precompute = [
        "data",
        "precompute",
        "less",
        "--out",
        "features",
        "--size",
        "32",
    ];
    done(
        home.path(),
        &[&precompute[..], &["--latents", "--text"]].concat(),
    );
    refused(&[], "11 samples");
    // With its data back, the run goes on.
    fs::remove_dir_all(at("features")).unwrap();
    fs::rename(at("aside"), at("features")).unwrap();
    done(home.path(), &training("run", &["run.max_steps=9"]));
}

#[test]
fn a_damaged_shard_is_named_and_can_be_passed_over() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    let precompute = [
        "data",
        "precompute",
        "set",
        "--out",
        "second",
        "--size",
        "32",
    ];
    done(
        home.path(),
        &[&precompute[..], &["--latents", "--text"]].concat(),
    );
    let shard = at("second/shard.00000.mds");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let both = "task.data.datasets=[features, second]";
    let output = run(home.path(), &training("run", &[both]));
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        stderr(&output).contains("second/shard.00000.mds"),
        "{}",
        said(&output)
    );
    let skip = "task.data.skip_damaged=true";
    let output = done(home.path(), &training("run", &[both, skip]));
    let told = stderr(&output);
    assert_eq!(told.matches("second/shard.00000.mds").count(), 1, "{told}");
    let last = log(&at("run")).pop().unwrap();
    assert_eq!(last["damaged_samples"], 11, "{last}");
}
