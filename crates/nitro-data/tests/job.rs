//! Jobs that are killed: nothing is lost, nothing comes twice.

use std::fs;
use std::path::Path;

use nitro_data::job::{JOB, Job, Share};
use nitro_data::mds::{Dataset, INDEX, Schema, Value, WriterOptions};
use serde_json::{Value as Json, json};

fn open(dir: &Path, job: Json) -> nitro_data::Result<Job<u64>> {
    let schema = Schema::new([("n", "int"), ("text", "str")]).unwrap();
    let options = WriterOptions {
        size_limit: 500,
        ..Default::default()
    };
    Job::open(dir, schema, options, job, 0)
}

fn write(job: &mut Job<u64>, n: u64) {
    let text = Value::Str(format!("sample {n}"));
    job.write(&[("n", Value::Int(n as i64)), ("text", text)], n + 1)
        .unwrap();
}

fn numbers(dir: &Path) -> Vec<i64> {
    let dataset = Dataset::open(dir).unwrap();
    let number = |i| match dataset.sample(i).unwrap().value("n").unwrap() {
        Value::Int(n) => n,
        other => panic!("{other:?}"),
    };
    (0..dataset.len()).map(number).collect()
}

#[test]
fn a_job_killed_anywhere_writes_what_an_unbroken_one_writes() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut job = open(whole.path(), json!("count")).unwrap();
    (0..100).for_each(|n| write(&mut job, n));
    job.finish(100).unwrap();

    let mut runs = 0;
    let mut stop = 0;
    loop {
        // Dropped without `finish`: all that a killed process leaves.
        let mut job = open(broken.path(), json!("count")).unwrap();
        let begin = *job.progress();
        assert_eq!((begin, job.samples() as u64), (stop, stop));
        stop = (begin + 7).min(100);
        (begin..stop).for_each(|n| write(&mut job, n));
        runs += 1;
        if stop == 100 {
            job.finish(100).unwrap();
            break;
        }
        drop(job);
        // A record that was being written when the process died.
        let pending = broken.path().join("nitro-job.pending");
        let mut bytes = fs::read(&pending).unwrap();
        bytes.extend_from_slice(&[9; 13]);
        fs::write(&pending, bytes).unwrap();
    }
    assert!(runs > 10);
    assert_eq!(numbers(broken.path()), (0..100).collect::<Vec<i64>>());
    for entry in fs::read_dir(whole.path()).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |dir: &Path| fs::read(dir.join(&name)).unwrap();
        assert!(read(whole.path()) == read(broken.path()), "{name:?}");
    }
}

#[test]
fn a_kill_between_shard_and_job_file_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = open(dir.path(), json!("count")).unwrap();
    (0..5).for_each(|n| write(&mut job, n));
    drop(job);
    let (state, pending) = (dir.path().join(JOB), dir.path().join("nitro-job.pending"));
    let before = (fs::read(&state).unwrap(), fs::read(&pending).unwrap());
    let mut job = open(dir.path(), json!("count")).unwrap();
    (5..30).for_each(|n| write(&mut job, n));
    drop(job);
    let after = fs::read(&state).unwrap();
    // The shard is there, the job file does not know it yet.
    fs::write(&state, &before.0).unwrap();
    fs::write(&pending, &before.1).unwrap();
    let job = open(dir.path(), json!("count")).unwrap();
    assert_eq!((job.samples(), *job.progress()), (5, 5));
    drop(job);
    // The job file knows it, the pending samples are still those of before.
    fs::write(&state, &after).unwrap();
    fs::write(&pending, &before.1).unwrap();
    let mut job = open(dir.path(), json!("count")).unwrap();
    assert_eq!(job.samples() as u64, *job.progress());
    let begin = *job.progress();
    assert!(begin > 5);
    (begin..40).for_each(|n| write(&mut job, n));
    job.finish(40).unwrap();
    assert_eq!(numbers(dir.path()), (0..40).collect::<Vec<i64>>());
}

#[test]
fn another_job_a_second_process_and_a_dataset_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = open(dir.path(), json!({"source": "a"})).unwrap();
    write(&mut job, 0);
    let busy = open(dir.path(), json!({"source": "a"}))
        .unwrap_err()
        .to_string();
    assert!(busy.contains("another process"), "{busy}");
    drop(job);
    let other = open(dir.path(), json!({"source": "b"}))
        .unwrap_err()
        .to_string();
    assert!(other.contains("another job"), "{other}");
    open(dir.path(), json!({"source": "a"}))
        .unwrap()
        .finish(1)
        .unwrap();
    // Finished: opening it again says so and finishing changes nothing.
    let again = open(dir.path(), json!({"source": "a"})).unwrap();
    assert!(again.is_finished());
    assert_eq!(again.finish(1).unwrap().samples(), 1);
    fs::remove_file(dir.path().join(JOB)).unwrap();
    let taken = open(dir.path(), json!({"source": "a"}))
        .unwrap_err()
        .to_string();
    assert!(taken.contains("holds a dataset"), "{taken}");
}

#[test]
fn ranks_are_merged_when_all_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let share = |rank| Share { rank, ranks: 3 };
    for rank in [2, 0, 1] {
        let mut job = open(&share(rank).folder(dir.path()).unwrap(), json!(rank)).unwrap();
        share(rank)
            .range(20)
            .for_each(|n| write(&mut job, n as u64));
        job.finish(20).unwrap();
        assert_eq!(share(rank).merge(dir.path()).unwrap(), rank == 1);
        assert_eq!(dir.path().join(INDEX).exists(), rank == 1);
    }
    assert_eq!(numbers(dir.path()), (0..20).collect::<Vec<i64>>());
    assert!(share(3).folder(dir.path()).is_err());
}
