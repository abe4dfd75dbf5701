//! The loader: the reference's order, the same with any number of threads, resumed at any batch.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use nitro_data::loader::{Loader, LoaderOptions, LoaderState};
use nitro_data::mds::order::{Order, Place, World};
use nitro_data::mds::{Dataset, DatasetOptions, OnDamage, Schema, Value, Writer, WriterOptions};
use nitro_data::{DataError, Result};

fn write(dir: &Path, count: i64) {
    let options = WriterOptions {
        size_limit: 300,
        ..Default::default()
    };
    let schema = Schema::new([("n", "int")]).unwrap();
    let mut writer = Writer::create(dir, schema, options).unwrap();
    (0..count).for_each(|n| writer.write(&[("n", Value::Int(n))]).unwrap());
    writer.finish().unwrap();
}

fn dataset(dir: &Path, on_damage: OnDamage) -> Arc<Dataset> {
    let options = DatasetOptions {
        on_damage,
        ..Default::default()
    };
    Arc::new(Dataset::open_all(&[dir.to_owned()], options).unwrap())
}

fn loader(
    data: &Arc<Dataset>,
    options: LoaderOptions,
    resume: Option<LoaderState>,
) -> Result<Loader<i64>> {
    Loader::new(
        data.clone(),
        options,
        resume,
        |index, sample| match sample.value("n")? {
            Value::Int(n) if n as usize == index => Ok(n),
            other => panic!("sample {index} holds {other:?}"),
        },
    )
}

fn options(threads: usize) -> LoaderOptions {
    LoaderOptions {
        threads,
        ..LoaderOptions::new(8)
    }
}

fn batches(loader: &mut Loader<i64>, count: usize) -> Vec<(u64, Vec<i64>)> {
    (0..count)
        .map(|_| {
            let batch = loader.next_batch().unwrap();
            (batch.epoch, batch.items)
        })
        .collect()
}

#[test]
fn batches_come_in_the_reference_order_whatever_the_threads() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 300);
    let data = dataset(dir.path(), OnDamage::Fail);
    let sizes = data.shard_sizes();
    let mut expected = Vec::new();
    for epoch in 0..3 {
        let work = Order::shuffled(8)
            .work(&sizes, World::SINGLE, Place::epoch(epoch))
            .unwrap();
        for batch in work.batches(0, 0, true) {
            expected.push((
                epoch,
                batch.into_iter().map(|i| i as i64).collect::<Vec<_>>(),
            ));
        }
    }
    for threads in [1, 2, 5] {
        let mut loader = loader(&data, options(threads), None).unwrap();
        assert_eq!(
            batches(&mut loader, expected.len()),
            expected,
            "{threads} threads"
        );
    }
}

#[test]
fn a_loader_goes_on_behind_any_batch() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 300);
    let data = dataset(dir.path(), OnDamage::Fail);
    for rank in 0..2 {
        let options = LoaderOptions {
            world: World {
                ranks_per_node: 2,
                ..World::SINGLE
            },
            rank,
            ..options(3)
        };
        let all = batches(&mut loader(&data, options.clone(), None).unwrap(), 60);
        assert!(all.last().unwrap().0 >= 2, "several epochs");
        for done in [1, 5, 19, 20, 21, 40, 45] {
            let mut first = loader(&data, options.clone(), None).unwrap();
            batches(&mut first, done);
            let state = serde_json::to_string(&first.state()).unwrap();
            let state = serde_json::from_str(&state).unwrap();
            let mut rest = loader(&data, options.clone(), Some(state)).unwrap();
            assert_eq!(
                batches(&mut rest, 60 - done),
                all[done..],
                "rank {rank} after {done}"
            );
        }
    }
}

#[test]
fn damage_is_an_error_or_skipped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 100);
    fs::write(dir.path().join("shard.00002.mds"), b"").unwrap();
    let strict = dataset(dir.path(), OnDamage::Fail);
    let mut walk = loader(&strict, options(2), None).unwrap();
    let error = (0..13).find_map(|_| walk.next_batch().err()).unwrap();
    assert!(matches!(error, DataError::Damaged { .. }), "{error}");

    let lenient = dataset(dir.path(), OnDamage::Skip);
    let lost = lenient.shards().nth(2).unwrap().samples;
    let mut walk = loader(&lenient, options(2), None).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while let Ok(batch) = walk.next_batch() {
        if batch.epoch > 0 {
            break;
        }
        seen.extend(batch.items);
    }
    assert_eq!(seen.len(), 100 - lost);
    assert_eq!(walk.dataset().damage()[0].samples, lost);
}

#[test]
fn an_epoch_without_a_batch_and_a_rank_too_many_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 5);
    let data = dataset(dir.path(), OnDamage::Fail);
    let sequential = LoaderOptions {
        order: Order::sequential(8),
        ..options(1)
    };
    let error = loader(&data, sequential.clone(), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("5 samples") && error.contains("smaller batch"),
        "{error}"
    );
    let keep = LoaderOptions {
        drop_last: false,
        ..sequential
    };
    let mut walk = loader(&data, keep, None).unwrap();
    assert_eq!(walk.next_batch().unwrap().items, [0, 1, 2, 3, 4]);
    let stranger = LoaderOptions {
        rank: 1,
        ..options(1)
    };
    assert!(loader(&data, stranger, None).is_err());
}

#[test]
fn a_panic_while_decoding_reaches_the_trainer() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 100);
    let data = dataset(dir.path(), OnDamage::Fail);
    let mut walk = Loader::new(data, options(2), None, |index, _| -> Result<i64> {
        assert!(index > 1_000_000, "on purpose");
        Ok(0)
    })
    .unwrap();
    assert!(
        walk.next_batch()
            .unwrap_err()
            .to_string()
            .contains("panicked")
    );
}
