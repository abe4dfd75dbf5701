//! The MPI communicator between processes that `mpirun` started: this test program starts itself.
#![cfg(feature = "mpi")]

use std::process::{Command, Output};

use nitro_comm::{Comm, CommError, Thread, agree, connect};

/// Says to the program that it is one of the processes, and what it does.
const ROLE: &str = "NITRO_COMM_TEST_ROLE";

/// `mpirun` of this program; of its tests, each process runs [`process`] alone.
fn mpirun(ranks: usize, role: &str) -> Output {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "-n", &ranks.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "process", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.output().expect("mpirun must be there")
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b));
    format!("{out}\n{err}")
}

/// Values with sums that depend on their order.
fn values(rank: usize, count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7 + rank * 13) as f32 * 0.37).sin() * 10f32.powi((i % 9) as i32 - 4))
        .collect()
}

/// What every process computes: more than one block, no multiple of the ranks, one value, none.
const COUNTS: [usize; 4] = [(1 << 22) + 1001, 7, 1, 0];

#[test]
fn process() {
    let Ok(role) = std::env::var(ROLE) else {
        return; // the other tests start the processes
    };
    let comm = connect().unwrap();
    let comm: &dyn Comm = &*comm;
    match role.as_str() {
        "sum" => {
            for count in COUNTS {
                let mut own = values(comm.rank(), count);
                comm.sum(&mut own).unwrap();
                let expected = Thread::run(comm.size(), |thread| {
                    let mut own = values(thread.rank(), count);
                    thread.sum(&mut own).unwrap();
                    own
                });
                assert!(own == expected[0], "{count} values differ");
            }
            let said = comm.gather("é".repeat(comm.rank()).as_bytes()).unwrap();
            let expected: Vec<_> = (0..comm.size())
                .map(|r| "é".repeat(r).into_bytes())
                .collect();
            assert_eq!(said, expected);
            let wrong = comm.sum(&mut vec![0.0; 3 + comm.rank()]).unwrap_err();
            assert!(
                matches!(wrong, CommError::Differ { rank: 1, .. }),
                "{wrong}"
            );
            let differ = agree(comm, "the step", &comm.rank().to_string()).unwrap_err();
            assert!(differ.to_string().contains("the step"), "{differ}");
            comm.leave().unwrap();
            let left = comm.wait().unwrap_err();
            assert!(left.to_string().contains("left the run"), "{left}");
            println!("rank {} of {} agrees", comm.rank(), comm.size());
        }
        // One fails while the others wait for it.
        "abort" if comm.rank() == 1 => comm.abort(3),
        "killed" if comm.rank() == 1 => {
            let me = std::process::id().to_string();
            Command::new("kill").args(["-9", &me]).status().unwrap();
        }
        _ => {
            comm.wait().unwrap();
            println!("rank {} went on", comm.rank());
        }
    }
}

#[test]
fn processes_sum_what_threads_sum_bit_by_bit() {
    for ranks in [2, 3] {
        let output = mpirun(ranks, "sum");
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        for rank in 0..ranks {
            assert!(
                text.contains(&format!("rank {rank} of {ranks} agrees")),
                "{text}"
            );
        }
    }
}

#[test]
fn an_error_of_one_rank_ends_all_with_its_code() {
    let output = mpirun(2, "abort");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(!text(&output).contains("went on"), "{}", text(&output));
}

#[test]
fn a_killed_rank_ends_all() {
    let output = mpirun(2, "killed");
    let text = text(&output);
    assert!(
        !output.status.success() && text.contains("signal 9"),
        "{text}"
    );
    assert!(!text.contains("went on"), "{text}");
}
