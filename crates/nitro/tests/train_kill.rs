//! `nitro train run` as a process: killed again and again at random moments it ends with the same bits
//! as a run that was left alone, and one thread is enough for it.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A run of a tiny autoencoder in `dir`.
fn train(dir: &Path) -> Command {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nitro"));
    command
        .args(["train", "run", "--quiet"])
        .arg(configs.join("miniature-autoencoder.yaml"))
        .args([
            "run.max_steps=60",
            "run.batch_size=2",
            "run.warmup_steps=5",
            "run.decay_steps=10",
            "run.save_every=3",
            "run.log_every=1",
            "run.sample_every=20",
            "task.image_size=32",
            "task.crop_size=16",
            "task.full_size_steps=10",
        ])
        .arg("--dir")
        .arg(dir)
        .arg("--export")
        .arg(dir.join("export"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// The bytes of the last checkpoint and of what was exported.
fn result(dir: &Path) -> [Vec<u8>; 2] {
    [
        "checkpoints/step-00000060.safetensors",
        "export/dc-ae/diffusion_pytorch_model.safetensors",
    ]
    .map(|name| std::fs::read(dir.join(name)).unwrap())
}

#[test]
fn a_killed_run_ends_as_if_it_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let (alone, killed) = (folder.path().join("alone"), folder.path().join("killed"));
    let begun = std::time::Instant::now();
    let output = train(&alone).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let whole = begun.elapsed();

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut random = now.as_nanos() as u64;
    println!("kill times from {random}");
    let mut kills = 0;
    while kills < 12 {
        let mut child = train(&killed).spawn().unwrap();
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let share = (random >> 40) as f64 / (1u64 << 24) as f64;
        std::thread::sleep(whole.mul_f64(0.1 + 0.5 * share) + Duration::from_millis(1));
        if child.try_wait().unwrap().is_some() {
            break; // it was done first
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 0, "the run was done before it could be killed once");
    let output = train(&killed).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(result(&killed), result(&alone), "after {kills} kills");

    let log = |dir: &Path| {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            (line["step"].as_u64(), line["loss"].as_f64())
        });
        lines.collect::<Vec<_>>()
    };
    assert_eq!(log(&killed), log(&alone), "every step is logged once");
}

/// Waits until `child` ends; hours of patience would not help one that waits for itself.
fn ends(mut child: Child) -> ExitStatus {
    for _ in 0..600 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    child.kill().unwrap();
    panic!("a run on one thread does not end");
}

#[test]
fn one_thread_trains_and_stops_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let one = |name: &str| {
        let mut command = train(&folder.path().join(name));
        command.env("RAYON_NUM_THREADS", "1");
        command
    };
    let status = ends(one("whole").spawn().unwrap());
    assert!(status.success(), "{status}");

    let mut child = one("stopped").arg("run.max_steps=1000000").spawn().unwrap();
    let first = folder.path().join("stopped/checkpoints");
    while !std::fs::read_dir(&first).is_ok_and(|mut files| files.next().is_some()) {
        let ended = child.try_wait().unwrap();
        assert_eq!(ended, None, "the run ended before its first checkpoint");
        std::thread::sleep(Duration::from_millis(50));
    }
    let signal = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(signal.unwrap().success());
    assert_eq!(ends(child).code(), Some(130));
}
