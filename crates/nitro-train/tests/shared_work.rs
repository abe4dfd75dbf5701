//! A batch computed in parts, by one process or two, is the same training within rounding.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nitro_train::TrainError;
use nitro_train::checkpoint::Checkpoint;
use nitro_train::comm::{Comm, CommError, Thread};
use nitro_train::config::RunConfig;
use nitro_train::miniature;
use nitro_train::store::ParameterStore;
use nitro_train::trainer::RunOptions;

fn config(extra: &str) -> RunConfig {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let overrides = [
        "run.max_steps=6",
        "run.batch_size=4",
        "run.warmup_steps=2",
        "run.decay_steps=0",
        "run.save_every=6",
        "run.sample_every=0",
        "run.log_every=1",
        "run.precision=f32",
        "task.image_size=32",
        "task.crop_size=16",
        "task.full_size_steps=0",
        extra,
    ];
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    RunConfig::load(&configs.join("miniature-autoencoder.yaml"), &overrides).unwrap()
}

/// Weights and losses of a run by `ranks` processes, each computing its share in `parts`: rounds, and parts
/// of a round.
fn run(folder: &Path, ranks: usize, parts: [usize; 2]) -> (ParameterStore, Vec<f64>) {
    let dir = folder.join(format!("{ranks}-{parts:?}"));
    let work = |comm: Thread, dir: PathBuf| {
        let mut config = config("run.seed=5");
        [config.run.accumulate, config.run.parallel] = parts;
        let options = RunOptions {
            quiet: true,
            comm: Arc::new(comm),
            ..RunOptions::default()
        };
        miniature::run(&config, &dir, &dir.join("export"), &options).unwrap();
    };
    Thread::run(ranks, |comm| work(comm, dir.clone()));
    let log = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let losses = log
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["loss"].as_f64().unwrap())
        .collect();
    let (_, checkpoint) = Checkpoint::latest(&dir).unwrap().unwrap();
    (checkpoint.store, losses)
}

#[test]
fn processes_and_parts_change_nothing_but_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let (weights, losses) = run(folder.path(), 1, [1, 1]);
    assert_eq!(losses.len(), 6);
    assert!(losses[5] < losses[0], "{losses:?}");
    for (ranks, parts) in [(1, [2, 1]), (2, [1, 1]), (2, [2, 1]), (2, [1, 2])] {
        let (others, curve) = run(folder.path(), ranks, parts);
        for (a, b) in losses.iter().zip(&curve) {
            assert!(
                (a - b).abs() < 1e-4 * a,
                "{ranks} x {parts:?}: {losses:?} {curve:?}"
            );
        }
        for (name, entry) in weights.iter() {
            let other = &others.get(name).unwrap().value;
            let square = |sum: f64, x: f64| sum + x * x;
            let pairs = entry.value.iter().zip(other);
            let error = pairs.map(|(a, b)| f64::from(a - b)).fold(0.0, square);
            let size = entry.value.iter().map(|a| f64::from(*a)).fold(1e-9, square);
            // AdamW divides by the gradient's size: the rounding of tiny gradients is magnified.
            let bound = 1e-4 * size + 1e-10;
            assert!(
                error < bound,
                "{ranks} x {parts:?}: {name} is off by {error:e} of {size:e}"
            );
        }
    }
}

#[test]
fn parts_at_the_same_time_give_the_bits_of_parts_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let results = [[4, 1], [2, 2], [1, 4]].map(|parts| run(folder.path(), 1, parts));
    let bits = |(weights, losses): &(ParameterStore, Vec<f64>)| {
        let weights = weights.iter().map(|(name, entry)| {
            let bits = entry.value.iter().map(|x| x.to_bits());
            (name.to_owned(), bits.collect::<Vec<_>>())
        });
        (weights.collect::<Vec<_>>(), losses.clone())
    };
    let [first, second, third] = results.each_ref().map(bits);
    assert!(first == second && second == third);
}

#[test]
fn a_batch_that_does_not_divide_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let options = RunOptions {
        quiet: true,
        ..RunOptions::default()
    };
    let error = miniature::run(&config("run.accumulate=3"), &dir, &dir, &options).unwrap_err();
    assert!(error.to_string().contains("batch_size 4"), "{error}");
    assert!(!dir.exists(), "nothing was written");
}

#[test]
fn processes_that_differ_are_told_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let start = |rank_seed: [u64; 2]| {
        Thread::run(2, |comm| {
            let seed = rank_seed[comm.rank()];
            let options = RunOptions {
                quiet: true,
                comm: Arc::new(comm),
                ..RunOptions::default()
            };
            let config = config(&format!("run.seed={seed}"));
            miniature::run(&config, &dir, &dir.join("export"), &options)
        })
    };
    for error in start([1, 2]) {
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("rank 1") && error.contains("configuration"),
            "{error}"
        );
    }
    assert!(!dir.join("config.json").exists(), "nothing was written");
}

#[test]
fn a_rank_that_fails_ends_the_others_and_leaves_a_whole_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let results = Thread::run(2, |comm| {
        let rank = comm.rank();
        let mut config = config("run.save_every=2");
        // Rank 1's disk is full, or its data are damaged: it goes as far as step 3.
        let comm: Arc<dyn Comm> = match rank {
            0 => Arc::new(comm),
            _ => Arc::new(Failing {
                comm,
                sums: AtomicUsize::new(0),
            }),
        };
        config.run.max_steps = 100;
        let options = RunOptions {
            quiet: true,
            comm,
            ..RunOptions::default()
        };
        miniature::run(&config, &dir, &dir.join("export"), &options)
    });
    for (rank, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert!(matches!(error, TrainError::Comm(_)), "rank {rank}: {error}");
    }
    let (_, checkpoint) = Checkpoint::latest(&dir).unwrap().unwrap();
    assert!(checkpoint.step >= 2 && checkpoint.step % 2 == 0);
    let options = RunOptions {
        quiet: true,
        ..RunOptions::default()
    };
    let mut config = config("run.save_every=2");
    config.run.max_steps = checkpoint.step + 2;
    miniature::run(&config, &dir, &dir.join("export"), &options).unwrap();
}

/// A rank whose fifth message fails.
#[derive(Debug)]
struct Failing {
    comm: Thread,
    sums: AtomicUsize,
}

impl Comm for Failing {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), CommError> {
        // Two messages a step: numbers, gradients.
        match self.sums.fetch_add(1, Ordering::Relaxed) {
            0..6 => self.comm.sum(values),
            _ => {
                self.comm.abort(1);
                Err(CommError::Gone { rank: 1 })
            }
        }
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.comm.gather(bytes)
    }

    fn abort(&self, code: i32) {
        self.comm.abort(code);
    }
}
