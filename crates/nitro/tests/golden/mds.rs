//! MDS datasets that mosaicml-streaming wrote, and the orders in which it reads them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nitro_data::mds::order::{Order, Place, Streams, World, partition, shuffle_py1s};
use nitro_data::mds::{
    Compression, Dataset, DatasetOptions, Hash, INDEX, Index, Value, Verify, Writer, WriterOptions,
    merge_index,
};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::compare::Report;
use crate::files::Case;

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let functions = case.dir.join("functions.json");
    if functions.exists() {
        for (i, call) in json::<Vec<Json>>(&functions)?.iter().enumerate() {
            function(i, call, report)?;
        }
    }
    let folder = case.dir.join("dataset");
    if folder.exists() {
        let options = DatasetOptions {
            verify: Verify::Hashes,
            ..Default::default()
        };
        let dataset = Dataset::open_all(std::slice::from_ref(&folder), options)?;
        samples(case, &dataset, report)?;
        tensors(case, &dataset, report)?;
        rewritten(&folder, report)?;
    }
    for entry in fs::read_dir(&case.dir)? {
        let path = entry?.path();
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("order") && path.is_file() {
            orders(&name, &path, &folder, report)?;
        }
    }
    Ok(())
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&fs::read(path)?).with_context(|| path.display().to_string())
}

fn field<T: DeserializeOwned>(json: &Json, key: &str) -> Result<T> {
    serde_json::from_value(json[key].clone()).with_context(|| key.to_owned())
}

fn function(i: usize, call: &Json, report: &mut Report) -> Result<()> {
    let name: String = field(call, "fn")?;
    let title = format!("{i}: {name}");
    let canonical: usize = field(call, "num_canonical_nodes")?;
    if name == "get_shuffle_py1s" {
        let sizes: Vec<usize> = field(call, "shard_sizes")?;
        let out = shuffle_py1s(
            &sizes,
            canonical,
            field(call, "seed")?,
            field(call, "epoch")?,
        )?;
        report.equal(&title, &out, &field(call, "out")?);
        return Ok(());
    }
    let world = World {
        nodes: field(call, "num_physical_nodes")?,
        ranks_per_node: field(call, "ranks_per_node")?,
        workers_per_rank: field(call, "workers_per_rank")?,
    };
    let work = partition(
        field(call, "num_samples")?,
        canonical,
        world,
        field(call, "batch_size")?,
        field(call, "drop_first")?,
        None,
    )?;
    report.equal(
        &format!("{title} shape"),
        &work.shape.to_vec(),
        &field(call, "shape")?,
    );
    report.equal(&title, &work.ids, &field(call, "out")?);
    Ok(())
}

/// Every sample's caption and the hash of every other column.
fn samples(case: &Case, dataset: &Dataset, report: &mut Report) -> Result<()> {
    let listed: Vec<Json> = json(&case.dir.join("samples.json"))?;
    report.equal("number of samples", &dataset.len(), &listed.len());
    let mut wrong = Vec::new();
    for (i, expected) in listed.iter().enumerate() {
        let sample = dataset.sample(i)?;
        for column in sample.schema().columns() {
            sample.value(&column.name)?;
        }
        let caption = expected.as_str().or_else(|| expected["caption"].as_str());
        if caption != Some(sample.text("caption")?) {
            wrong.push(format!("{i} caption"));
        }
        for (name, about) in expected["fields"].as_object().into_iter().flatten() {
            let bytes = sample.bytes(name)?;
            let digest = Hash::Sha256.digest(bytes);
            if about["sha256"] != digest.as_str() || about["bytes"] != bytes.len() {
                wrong.push(format!("{i} {name}"));
            }
        }
    }
    report.equal("samples that differ", &wrong, &Vec::new());
    Ok(())
}

/// Decoded pictures (`jpg.3`) and latents (`latents.3`).
fn tensors(case: &Case, dataset: &Dataset, report: &mut Report) -> Result<()> {
    if !case.dir.join("outputs.safetensors").exists() {
        return Ok(());
    }
    let outputs = case.tensors("outputs")?;
    for name in outputs.names().map(str::to_owned).collect::<Vec<_>>() {
        let (column, index) = name.split_once('.').context("a tensor's name")?;
        let sample = dataset.sample(index.parse()?)?;
        let expected = outputs.get(&name)?;
        if expected.dtype == Dtype::U8 {
            let picture = sample.picture(column)?;
            let size = [picture.height() as usize, picture.width() as usize, 3];
            report.equal(&format!("{name} shape"), &size.to_vec(), &expected.shape);
            let off = picture
                .as_raw()
                .iter()
                .zip(&expected.bytes)
                .map(|(a, b)| a.abs_diff(*b));
            let most = case.get("/tolerance/jpeg_decode_max_abs")?;
            report.at_most(&name, off.max().unwrap_or(255).into(), most);
        } else {
            let found = dataset
                .schema()
                .columns()
                .iter()
                .find(|c| c.name.starts_with(column));
            let found = found.with_context(|| format!("a column for {name}"))?;
            let halves = expected.read(half::f16::from_le_bytes);
            let expected: Vec<f32> = halves.into_iter().map(half::f16::to_f32).collect();
            report.equal(&name, &sample.f16s(&found.name)?, &expected);
        }
    }
    Ok(())
}

/// Writes the dataset again, from decoded values: the same bytes, except where compressed.
fn rewritten(folder: &Path, report: &mut Report) -> Result<()> {
    let out = tempfile::tempdir()?;
    let index = Index::read(folder)?;
    let mut parts: Vec<PathBuf> = Vec::new();
    for shard in &index.shards {
        let parent = Path::new(&shard.stored().basename)
            .parent()
            .unwrap_or(Path::new(""));
        if parts.last().is_none_or(|last| last != parent) {
            parts.push(parent.to_owned());
        }
    }
    for part in &parts {
        let dataset = Dataset::open(folder.join(part))?;
        let about = dataset.shards().next().context("a shard")?.clone();
        let options = WriterOptions {
            compression: about
                .compression
                .as_deref()
                .map(str::parse::<Compression>)
                .transpose()?,
            hashes: about
                .hashes
                .iter()
                .map(|h| Hash::from_name(h))
                .collect::<Result<_, _>>()?,
            size_limit: about
                .size_limit
                .as_ref()
                .and_then(Json::as_u64)
                .context("size_limit")?,
        };
        let mut writer = Writer::create(&out.path().join(part), about.schema()?, options)?;
        for i in 0..dataset.len() {
            let sample = dataset.sample(i)?;
            let columns = sample.schema().columns();
            let values: Vec<(&str, Value)> = columns
                .iter()
                .map(|column| Ok((column.name.as_str(), sample.value(&column.name)?)))
                .collect::<Result<_>>()?;
            writer.write(&values)?;
        }
        writer.finish()?;
    }
    if parts != [PathBuf::new()] {
        merge_index(out.path(), &parts)?;
    }
    let again = Index::read(out.path())?;
    let raw = |index: &Index| {
        index
            .shards
            .iter()
            .map(|s| s.raw_data.clone())
            .collect::<Vec<_>>()
    };
    report.equal(
        "shards written again, uncompressed",
        &raw(&again),
        &raw(&index),
    );
    if index.shards.iter().all(|shard| shard.compression.is_none()) {
        let mut names: Vec<&str> = index
            .shards
            .iter()
            .map(|s| s.raw_data.basename.as_str())
            .collect();
        names.push(INDEX);
        for name in names {
            let same = fs::read(out.path().join(name))? == fs::read(folder.join(name))?;
            report.equal(&format!("{name} written again"), &same, &true);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Orders {
    dataset_args: Args,
    #[serde(default)]
    iterated: Json,
    generate_work: Vec<Json>,
    #[serde(default)]
    dataloader: Vec<Json>,
}

#[derive(Deserialize)]
struct Args {
    samples_per_shard: Vec<usize>,
    shuffle: bool,
    shuffle_seed: u64,
    batch_size: usize,
}

fn orders(name: &str, path: &Path, folder: &Path, report: &mut Report) -> Result<()> {
    let all: Orders = json(path)?;
    let args = &all.dataset_args;
    let sizes = match name {
        "order_two_streams" => {
            let streams = [folder.join("0"), folder.join("1")];
            Dataset::open_all(&streams, DatasetOptions::default())?
                .shard_sizes()
                .concat()
        }
        _ => Dataset::open(folder)?.shard_sizes().concat(),
    };
    report.equal(
        &format!("{name} shard sizes"),
        &sizes,
        &args.samples_per_shard,
    );
    let order = Order {
        shuffle: args.shuffle,
        seed: args.shuffle_seed,
        canonical_nodes: None,
        batch_size: args.batch_size,
        streams: Streams::default(),
    };
    for (i, given) in all.generate_work.iter().enumerate() {
        let world = World {
            nodes: field(given, "num_nodes")?,
            ranks_per_node: field(given, "ranks_per_node")?,
            workers_per_rank: field(given, "workers_per_rank")?,
        };
        let place = Place {
            epoch: field(given, "epoch")?,
            sample_in_epoch: field(given, "sample_in_epoch")?,
            ..Place::default()
        };
        let work = order.work(&[&sizes], world, place)?;
        let title = format!("{name} generate_work {i}");
        report.equal(
            &format!("{title} canonical nodes"),
            &order.canonical_nodes_in(world),
            &field(given, "num_canonical_nodes")?,
        );
        report.equal(
            &format!("{title} shape"),
            &work.shape.to_vec(),
            &field(given, "shape")?,
        );
        report.equal(&title, &work.ids, &field(given, "sample_ids")?);
    }
    iterated(name, &all.iterated, &order, &sizes, report)?;
    for given in &all.dataloader {
        let workers: usize = field(given, "num_workers")?;
        let order = Order {
            batch_size: field(given, "batch_size")?,
            ..order.clone()
        };
        let world = World {
            workers_per_rank: workers,
            ..World::SINGLE
        };
        for (epoch, batches) in given["epochs"].as_object().into_iter().flatten() {
            let work = order.work(&[&sizes], world, Place::epoch(epoch.parse()?))?;
            let found = work.batches(0, 0, field(given, "drop_last")?);
            let title = format!("{name} DataLoader, {workers} workers, epoch {epoch}");
            report.equal(&title, &found, &serde_json::from_value(batches.clone())?);
        }
    }
    Ok(())
}

/// What iterating a `StreamingDataset` yields: per epoch for one rank, with and without shuffle, and
/// for each of two ranks.
fn iterated(
    name: &str,
    given: &Json,
    order: &Order,
    sizes: &[usize],
    report: &mut Report,
) -> Result<()> {
    for key in ["iterated_single_rank", "iterated_single_rank_no_shuffle"] {
        let canonical = given[key]["num_canonical_nodes"].as_u64();
        let order = Order {
            shuffle: !key.ends_with("no_shuffle") && order.shuffle,
            canonical_nodes: canonical.map(|n| n as usize),
            ..order.clone()
        };
        for (epoch, expected) in given[key].as_object().into_iter().flatten() {
            let Ok(epoch) = epoch.parse() else { continue };
            let work = order.work(&[sizes], World::SINGLE, Place::epoch(epoch))?;
            let expected = serde_json::from_value(expected.clone())?;
            report.equal(
                &format!("{name} {key} {epoch}"),
                &work.worker(0, 0, 0),
                &expected,
            );
        }
    }
    let two = World {
        ranks_per_node: 2,
        ..World::SINGLE
    };
    for (rank, epochs) in given["iterated_two_ranks"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let epochs = epochs
            .as_array()
            .ok_or_else(|| anyhow!("epochs of rank {rank}"))?;
        for (epoch, expected) in epochs.iter().enumerate() {
            let work = order.work(&[sizes], two, Place::epoch(epoch as u64))?;
            let expected = serde_json::from_value(expected.clone())?;
            let title = format!("{name} rank {rank} of 2, epoch {epoch}");
            report.equal(&title, &work.worker(0, rank, 0), &expected);
        }
    }
    Ok(())
}
