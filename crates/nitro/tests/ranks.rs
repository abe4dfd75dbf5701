//! One run of several processes, as `mpirun` or `srun` starts them.
//!
//! With the feature `mpi`: training, data jobs and evaluation under `mpirun`, with ranks that fail and
//! are killed. Without it: that nobody mistakes several processes for one run.

mod support;

#[cfg(not(feature = "mpi"))]
mod without_mpi {
    use super::support::{nitro, said, stderr};

    /// What Open MPI's mpirun tells the second of four processes.
    const LAUNCHED: [(&str, &str); 2] =
        [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")];

    #[test]
    fn several_processes_are_refused_unless_they_are_runs_of_their_own() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("photos")).unwrap();
        let commands = [
            &[
                "train", "run", "run.yaml", "--dir", "run", "--export", "out",
            ][..],
            &["train", "grpo"],
            &["data", "ingest", "folder", "photos", "--out", "set"],
            &["eval", "shapes", "--limit", "1"],
            &["reproduce", "ablations"],
        ];
        for command in commands {
            let output = nitro(home.path())
                .args(command)
                .envs(LAUNCHED)
                .output()
                .unwrap();
            assert_eq!(output.status.code(), Some(2), "{}", said(&output));
            let told = stderr(&output);
            assert!(
                told.contains("OMPI_COMM_WORLD_SIZE started 4 processes"),
                "{told}"
            );
            assert!(told.contains("--features mpi"), "{told}");
            assert_eq!(
                std::fs::read_dir(home.path()).unwrap().count(),
                1,
                "{command:?}"
            );
        }
        // The folder holds no picture: that is what each says which goes its own way.
        let ingest = ["data", "ingest", "folder", "photos", "--out", "set"];
        let ranks = [&ingest[..], &["--rank", "1", "--ranks", "4"]].concat();
        for (arguments, switch) in [(&ingest[..], "0"), (&ranks, "1")] {
            let output = nitro(home.path())
                .args(arguments)
                .envs(LAUNCHED)
                .env("NITRO_MPI", switch)
                .output()
                .unwrap();
            assert!(
                stderr(&output).contains("holds no jpg"),
                "{}",
                said(&output)
            );
        }
    }
}

#[cfg(feature = "mpi")]
mod under_mpirun {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use nitro_data::mds::Dataset;
    use serde_json::{Value, json};

    use super::support::scorers::{
        geneval_prompts, tiny_clip, tiny_detector, tiny_image_reward, write,
    };
    use super::support::{golden_model, nitro, said, stderr, stdout};

    /// `mpirun` of `ranks` processes, each of them this command.
    fn mpirun(home: &Path, ranks: usize, arguments: &[&str]) -> Command {
        let mut command = launcher(home);
        command
            .args(["-n", &ranks.to_string()])
            .arg(env!("CARGO_BIN_EXE_nitro"))
            .args(arguments);
        command
    }

    /// `mpirun` with the environment of [`nitro`], on a machine with too few cores and maybe as root.
    fn launcher(home: &Path) -> Command {
        let like = nitro(home);
        let mut command = Command::new("mpirun");
        for (name, value) in like.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
            .args(["--oversubscribe", "--bind-to", "none"])
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .current_dir(home);
        command
    }

    fn done(command: &mut Command) -> Output {
        let output = command.output().expect("mpirun must be there");
        assert!(output.status.success(), "{}", said(&output));
        output
    }

    /// A command that went well, of one process or more.
    fn shared(home: &Path, ranks: usize, arguments: &[&str]) -> Output {
        match ranks {
            1 => done(nitro(home).args(arguments)),
            ranks => done(&mut mpirun(home, ranks, arguments)),
        }
    }

    /// A run of a tiny autoencoder in `dir`.
    fn train<'a>(dir: &'a str, export: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let config = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../configs/miniature-autoencoder.yaml"
        );
        let run = [
            "train",
            "run",
            config,
            "run.max_steps=24",
            "run.batch_size=4",
            "run.warmup_steps=5",
            "run.decay_steps=10",
            "run.save_every=3",
            "run.log_every=1",
            "run.sample_every=12",
            "run.precision=f32",
            "task.image_size=32",
            "task.crop_size=16",
            "task.full_size_steps=6",
            "--dir",
            dir,
            "--export",
            export,
        ];
        [&run[..], more].concat()
    }

    /// Steps and their losses.
    fn losses(dir: &Path) -> Vec<(u64, f64)> {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            (
                line["step"].as_u64().unwrap(),
                line["loss"].as_f64().unwrap(),
            )
        });
        lines.collect()
    }

    fn checkpoint(dir: &Path, step: u64) -> PathBuf {
        dir.join(format!("checkpoints/step-{step:08}.safetensors"))
    }

    #[test]
    fn two_ranks_train_what_one_process_trains() {
        let home = tempfile::tempdir().unwrap();
        done(nitro(home.path()).args(train("one", "one/export", &[])));
        let output = done(&mut mpirun(
            home.path(),
            2,
            &train("two", "two/export", &[]),
        ));
        // Rank 0 writes and talks.
        assert_eq!(stdout(&output), "", "{}", said(&output));
        let [one, two] = ["one", "two"].map(|dir| losses(&home.path().join(dir)));
        assert_eq!(two.len(), 24, "every step is logged once");
        for ((step, alone), (_, shared)) in one.iter().zip(&two) {
            let error = (alone - shared).abs() / alone;
            assert!(error < 1e-4, "step {step}: {alone} and {shared}");
        }
        let exported = "two/export/dc-ae/diffusion_pytorch_model.safetensors";
        assert!(home.path().join(exported).exists());
        let starts = std::fs::read_to_string(home.path().join("two/starts.jsonl")).unwrap();
        assert_eq!(starts.lines().count(), 1);
        assert!(starts.contains("\"processes\":2"), "{starts}");
    }

    /// The processes that `mpirun` started, by rank.
    fn ranks(mpirun: &Child) -> BTreeMap<String, u32> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(process) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let read = |name| std::fs::read(entry.path().join(name)).unwrap_or_default();
            let status = String::from_utf8_lossy(&read("status")).into_owned();
            let parent = format!("PPid:\t{}", mpirun.id());
            if !status.lines().any(|line| line == parent) {
                continue;
            }
            let environment = read("environ");
            let name = b"OMPI_COMM_WORLD_RANK=";
            let rank = environment
                .split(|byte| *byte == 0)
                .find_map(|variable| variable.strip_prefix(name));
            if let Some(rank) = rank {
                found.insert(String::from_utf8_lossy(rank).into_owned(), process);
            }
        }
        found
    }

    #[test]
    fn a_killed_rank_ends_the_run_which_goes_on_with_the_same_bits() {
        let home = tempfile::tempdir().unwrap();
        done(&mut mpirun(
            home.path(),
            2,
            &train("alone", "alone/export", &[]),
        ));
        for (rank, after) in [("1", 3), ("0", 9)] {
            let mut run = mpirun(home.path(), 2, &train("killed", "killed/export", &[]));
            let run = run.stdout(Stdio::piped()).stderr(Stdio::piped());
            let run = run.spawn().unwrap();
            let begun = Instant::now();
            while !checkpoint(&home.path().join("killed"), after).exists() {
                assert!(begun.elapsed() < Duration::from_secs(120), "no checkpoint");
                std::thread::sleep(Duration::from_millis(2));
            }
            let process = ranks(&run)[rank].to_string();
            Command::new("kill")
                .args(["-9", &process])
                .status()
                .unwrap();
            let output = run.wait_with_output().unwrap();
            assert!(!output.status.success(), "{}", said(&output));
            assert!(
                said(&output).contains("signal 9 (Killed)"),
                "{}",
                said(&output)
            );
        }
        done(&mut mpirun(
            home.path(),
            2,
            &train("killed", "killed/export", &[]),
        ));
        let result = |dir: &str| {
            let dir = home.path().join(dir);
            (std::fs::read(checkpoint(&dir, 24)).unwrap(), losses(&dir))
        };
        assert!(result("killed") == result("alone"));
    }

    #[test]
    fn a_rank_that_fails_ends_the_run_and_says_why() {
        let home = tempfile::tempdir().unwrap();
        let binary = env!("CARGO_BIN_EXE_nitro");
        let started = |own: &[&str]| {
            let mut command = launcher(home.path());
            command
                .args(["-n", "1", binary])
                .args(train("run", "run/export", &[]))
                .args([":", "-n", "1", binary])
                .args(own);
            command.output().unwrap()
        };
        // The second has no configuration, while the first waits for it.
        let output = started(&["train", "run", "none.yaml", "--dir", "run", "--export", "x"]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(
            stderr(&output).contains("error: rank 1 of 2: none.yaml"),
            "{}",
            said(&output)
        );
        // The second is another run.
        let other = train("run", "run/export", &["run.seed=5"]);
        let output = started(&other);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let told = stderr(&output);
        assert!(
            told.contains("error: the processes of the run differ in configuration"),
            "{told}"
        );
        assert!(!told.contains("error: rank 1"), "once is enough: {told}");
        assert!(!home.path().join("run/config.json").exists());
    }

    #[test]
    fn what_is_one_process_says_so() {
        let home = tempfile::tempdir().unwrap();
        for arguments in [
            &["train", "grpo", "--export", "out"][..],
            &["reproduce", "ablations"],
        ] {
            let output = mpirun(home.path(), 2, arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{}", said(&output));
            assert!(
                stderr(&output).contains("as one process"),
                "{}",
                said(&output)
            );
        }
    }

    #[test]
    fn data_jobs_and_benchmarks_are_shared_without_arguments() {
        let home = tempfile::tempdir().unwrap();
        let prompts: String = (0..7)
            .map(|i| format!("a red circle number {i}\n"))
            .collect();
        std::fs::write(home.path().join("prompts.txt"), prompts).unwrap();
        let synthesize = [
            "data",
            "synthesize",
            "prompts.txt",
            "--steps",
            "1",
            "--json",
        ];
        let precompute = [
            "data",
            "precompute",
            "raw",
            "--size",
            "128",
            "--latents",
            "--json",
        ];
        let bench = ["eval", "shapes", "--limit", "3", "--steps", "1", "--json"];
        let run = |ranks: usize, arguments: &[&str], out: &str| -> Value {
            let arguments = [arguments, &["--quiet", "--out", out]].concat();
            let output = shared(home.path(), ranks, &arguments);
            serde_json::from_str(stdout(&output).trim())
                .unwrap_or_else(|e| panic!("{e}: {}", said(&output)))
        };
        let raw = run(3, &synthesize, "raw");
        assert_eq!(
            (raw["samples"].as_u64(), &raw["complete"]),
            (Some(7), &Value::Bool(true))
        );
        let made = run(3, &precompute, "shared");
        assert_eq!(
            (made["samples"].as_u64(), &made["complete"]),
            (Some(7), &Value::Bool(true))
        );
        run(1, &precompute, "alone");
        let [shared, alone] =
            ["shared", "alone"].map(|name| Dataset::open(home.path().join(name)).unwrap());
        assert_eq!(shared.len(), 7);
        for i in 0..7 {
            let [a, b] = [&shared, &alone].map(|set| set.sample(i).unwrap());
            assert_eq!(a.text("caption").unwrap(), b.text("caption").unwrap());
            assert_eq!(
                a.bytes("latents_128").unwrap(),
                b.bytes("latents_128").unwrap()
            );
        }
        assert_eq!(run(2, &bench, "bench2"), run(1, &bench, "bench1"));
        let results = |name: &str| {
            let text = std::fs::read_to_string(home.path().join(name).join("results.jsonl"));
            text.unwrap().replace(name, "bench")
        };
        assert_eq!(results("bench2"), results("bench1"));
        assert_eq!(results("bench1").lines().count(), 12);
    }

    #[test]
    fn neural_benchmarks_of_two_ranks_are_those_of_one() {
        let home = tempfile::tempdir().unwrap();
        let path = |file: &str| home.path().join(file);
        tiny_clip(&path("clip"));
        tiny_image_reward(&path("reward"));
        tiny_detector(&path("detector"));
        write(
            &path("styles/anime.json"),
            &json!(["a red circle", "a blue star", "a ring"]),
        );
        let asked = ["a red circle", "a blue star above a ring", "two hearts"];
        let asked = asked.map(|prompt| json!({ "id": prompt, "prompt": prompt }));
        write(&path("prompts.json"), &json!(asked));
        geneval_prompts(&path("prompts.jsonl"));
        let model = golden_model();
        let model = model.to_str().unwrap();
        let benchmarks = [
            (
                &["hps", "--hps", "clip", "--prompts", "styles"][..],
                &["hps.jsonl"][..],
            ),
            (
                &[
                    "image-reward",
                    "--image-reward",
                    "reward",
                    "--prompts",
                    "prompts.json",
                    "-N",
                    "2",
                ],
                &["ImageReward-v1.0-benchmark-result.json"],
            ),
            (
                &[
                    "geneval",
                    "--detector",
                    "detector",
                    "--clip",
                    "clip",
                    "--prompts",
                    "prompts.jsonl",
                ],
                &["results.jsonl", "results-without-duplicates.jsonl"],
            ),
        ];
        for (benchmark, files) in benchmarks {
            let run = |ranks: usize, out: &str| {
                let more = ["--model", model, "--steps", "1", "--quiet", "--out", out];
                let arguments = [&["eval"], benchmark, &more].concat();
                let output = shared(home.path(), ranks, &arguments);
                let read = |file: &&str| {
                    let text = std::fs::read_to_string(path(out).join(file)).unwrap();
                    text.replace(out, "out")
                };
                (stdout(&output), files.iter().map(read).collect::<Vec<_>>())
            };
            let (one, two) = (format!("{}-1", benchmark[0]), format!("{}-2", benchmark[0]));
            assert_eq!(run(2, &two), run(1, &one));
        }
    }
}
