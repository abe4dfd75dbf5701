//! The other direction: shards written here, read by the Python package mosaicml-streaming.
//!
//! The package is taken from `NITRO_PYTHON` (or `python3`) if it is there, else installed with pip
//! into the build folder. Where neither works the test prints why and passes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use nitro_data::image::encode_jpeg;
use nitro_data::mds::order::{Order, Place, Streams, Weight, World};
use nitro_data::mds::{
    Array, Compression, Dataset, Dtype, Hash, Scalar, Schema, Value, Writer, WriterOptions,
};
use serde_json::{Value as Json, json};

const PACKAGES: [&str; 16] = [
    "mosaicml-streaming==0.13.0",
    "numpy",
    "pillow",
    "xxhash",
    "zstd",
    "Brotli",
    "python-snappy",
    "cramjam",
    "filelock",
    "tqdm",
    "typing_extensions",
    "catalogue",
    "pyyaml",
    "requests",
    "urllib3",
    "certifi",
];

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/python")
        .join(name)
}

fn has_package(python: &Path) -> bool {
    let code = "import importlib.util as u, sys; sys.exit(u.find_spec('streaming') is None)";
    let status = Command::new(python).args(["-c", code]).output();
    status.is_ok_and(|output| output.status.success())
}

/// A Python with the package; says why if there is none. Tests run side by side: the first one looks.
fn python() -> Option<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOUND.get_or_init(find_python) {
        Ok(python) => Some(python.clone()),
        Err(reason) => {
            println!("skipped: mosaicml-streaming cannot be installed here ({reason})");
            None
        }
    }
}

fn find_python() -> Result<PathBuf, String> {
    let own = std::env::var_os("NITRO_PYTHON").unwrap_or("python3".into());
    let own = PathBuf::from(own);
    if has_package(&own) {
        return Ok(own);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mosaicml-streaming");
    let python = folder.join("bin/python");
    if has_package(&python) {
        return Ok(python);
    }
    let run = |command: &mut Command| -> Result<(), String> {
        let output = command.output().map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().last().unwrap_or("no message").to_owned();
        output.status.success().then_some(()).ok_or(last)
    };
    run(Command::new(own).args(["-m", "venv"]).arg(&folder))?;
    let pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--retries",
        "0",
        "--timeout",
        "20",
    ];
    run(Command::new(&python).args(pip).args(PACKAGES))?;
    Ok(python)
}

#[test]
fn python_reads_what_is_written_here() {
    let Some(python) = python() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    for (name, compression) in [("raw", None), ("zip", Some("zstd:7"))] {
        let out = dir.path().join(name);
        let expected = write(&out, compression);
        let scratch = dir.path().join(format!("{name}-scratch"));
        std::fs::create_dir(&scratch).unwrap();
        let seen = run(Command::new(&python)
            .arg(script("read_mds.py"))
            .args([&out, &scratch]));
        println!("{name}: mosaicml-streaming {}", seen["version"]);
        assert_eq!(seen["samples"], Json::Array(expected), "{name}");

        let sizes = Dataset::open(&out).unwrap().shard_sizes();
        for seed in [9176, 5] {
            let order = Order {
                seed,
                ..Order::shuffled(4)
            };
            for epoch in 0..2 {
                let work = order
                    .work(&sizes, World::SINGLE, Place::epoch(epoch))
                    .unwrap();
                let theirs = &seen["orders"][seed.to_string()][epoch as usize];
                assert_eq!(
                    *theirs,
                    json!(work.worker(0, 0, 0)),
                    "seed {seed}, epoch {epoch}"
                );
            }
        }
    }
}

/// The JSON in the last line that a script printed. One script at a time: the package names its shared memory
/// by a number that two processes starting together both find free.
fn run(script: &mut Command) -> Json {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let output = script.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap()
}

/// Streams that the package weights, and how an epoch is made up of them.
struct Case {
    /// Keys and values of each `Stream`.
    weights: [Json; 2],
    /// Arguments of the `StreamingDataset`.
    dataset: Json,
}

impl Case {
    /// The same, in our words.
    fn order(&self) -> Order {
        let weight = |stream: &Json| match stream.as_object().unwrap().is_empty() {
            true => None,
            false => Some(serde_json::from_value::<Weight>(stream.clone()).unwrap()),
        };
        let number = |key: &str| self.dataset[key].as_u64();
        let named = |key: &str| serde_json::from_value(self.dataset[key].clone());
        Order {
            shuffle: self.dataset["shuffle"].as_bool().unwrap(),
            seed: number("shuffle_seed").unwrap(),
            streams: Streams {
                weights: self.weights.iter().map(weight).collect(),
                epoch_size: number("epoch_size").map(|size| size as usize),
                sampling: named("sampling_method").unwrap_or_default(),
                granularity: number("sampling_granularity").unwrap_or(1) as usize,
            },
            ..Order::shuffled(4)
        }
    }
}

#[test]
fn weighted_streams_come_in_the_order_of_the_package() {
    let Some(python) = python() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let folders = ["a", "b"].map(|name| dir.path().join(name));
    numbers(&folders[0], 157);
    numbers(&folders[1], 71);
    let case = |weights, dataset| Case { weights, dataset };
    let none = || json!({});
    let cases = [
        case(
            [none(), none()],
            json!({"shuffle": true, "shuffle_seed": 7}),
        ),
        case(
            [json!({"repeat": 2.0}), json!({"repeat": 0.5})],
            json!({"shuffle": true, "shuffle_seed": 9176}),
        ),
        case(
            [json!({"choose": 33}), none()],
            json!({"shuffle": true, "shuffle_seed": 3, "sampling_granularity": 5}),
        ),
        case(
            [json!({"repeat": 1.37}), json!({"choose": 100})],
            json!({"shuffle": false, "shuffle_seed": 3}),
        ),
        case(
            [json!({"proportion": 0.3}), json!({"proportion": 0.5})],
            json!({"shuffle": true, "shuffle_seed": 11}),
        ),
        case(
            [json!({"proportion": 2.0}), json!({"proportion": 5.0})],
            json!({"shuffle": true, "shuffle_seed": 12, "epoch_size": 333, "sampling_method": "fixed"}),
        ),
        case(
            [none(), none()],
            json!({"shuffle": true, "shuffle_seed": 5, "epoch_size": 101}),
        ),
        case(
            [json!({"repeat": 0.0}), none()],
            json!({"shuffle": true, "shuffle_seed": 5}),
        ),
    ];
    let asked: Vec<Json> = cases
        .iter()
        .map(|case| {
            let streams = folders.iter().zip(&case.weights).map(|(folder, weight)| {
                let mut stream = weight.clone();
                stream["local"] = json!(folder);
                stream
            });
            json!({"streams": streams.collect::<Vec<_>>(), "dataset": case.dataset})
        })
        .collect();
    let theirs = run(Command::new(&python)
        .arg(script("streams.py"))
        .args([&json!(asked).to_string(), dir.path().to_str().unwrap()]));
    let sizes = Dataset::open_all(&folders, Default::default())
        .unwrap()
        .shard_sizes();
    assert!(sizes[0].len() > 3 && sizes[1].len() > 1, "{sizes:?}");
    for (i, case) in cases.iter().enumerate() {
        for epoch in 0..2 {
            let work = case
                .order()
                .work(&sizes, World::SINGLE, Place::epoch(epoch))
                .unwrap();
            let ours = json!(work.worker(0, 0, 0));
            assert_eq!(theirs[i][epoch as usize], ours, "case {i}, epoch {epoch}");
        }
    }
}

/// A dataset of numbers in shards of about thirty.
fn numbers(out: &Path, count: i64) {
    let options = WriterOptions {
        size_limit: 800,
        ..WriterOptions::default()
    };
    let schema = Schema::new([("n", "int")]).unwrap();
    let mut writer = Writer::create(out, schema, options).unwrap();
    for n in 0..count {
        writer.write(&[("n", Value::Int(n))]).unwrap();
    }
    writer.finish().unwrap();
}

/// Writes 90 samples and gives what Python is to see of them.
fn write(out: &Path, compression: Option<&str>) -> Vec<Json> {
    let columns = [
        ("caption", "str"),
        ("count", "int"),
        ("jpg", "jpeg"),
        ("latents_512", "bytes"),
        ("meta", "json"),
        ("weight", "float32"),
        ("array", "ndarray"),
        ("fixed", "ndarray:int16:2,2"),
    ];
    let options = WriterOptions {
        compression: compression.map(|c| c.parse::<Compression>().unwrap()),
        hashes: vec![Hash::Sha1],
        size_limit: 20_000,
    };
    let mut writer = Writer::create(out, Schema::new(columns).unwrap(), options).unwrap();
    let sha = |bytes: &[u8]| Hash::Sha256.digest(bytes);
    let seen = (0..90u8)
        .map(|i| {
            let picture = image::RgbImage::from_pixel(8, 6, image::Rgb([i, 100, 200]));
            let jpg = encode_jpeg(&picture, 90).unwrap();
            let decoded = nitro_data::image::decode(&jpg).unwrap();
            let latents = vec![i; 64];
            let floats: Vec<u8> = (0..6)
                .flat_map(|k| (f32::from(i) + k as f32).to_le_bytes())
                .collect();
            let fixed = vec![i, 0, 2, 0, 3, 0, 4, 1];
            let array = |dtype, shape: [usize; 2], data: &[u8]| {
                Value::Array(Array {
                    dtype,
                    shape: shape.to_vec(),
                    data: data.to_vec(),
                })
            };
            let meta = json!({"id": i, "text": "grün \"x\""});
            let caption = format!("ein Füchslein \u{1f98a} {i}");
            let values = [
                ("caption", Value::Str(caption.clone())),
                ("count", Value::Int(-i64::from(i))),
                ("jpg", Value::Image(jpg)),
                ("latents_512", Value::Bytes(latents.clone())),
                ("meta", Value::Json(meta.clone())),
                ("weight", Value::Scalar(Scalar::F32(0.5))),
                ("array", array(Dtype::F32, [2, 3], &floats)),
                ("fixed", array(Dtype::I16, [2, 2], &fixed)),
            ];
            writer.write(&values).unwrap();
            json!({
                "caption": caption,
                "count": -i64::from(i),
                "jpg": ["[8, 6]", sha(decoded.as_raw())],
                "latents_512": sha(&latents),
                "meta": meta,
                "weight": ["[]", sha(&0.5f32.to_le_bytes())],
                "array": ["[2, 3]", sha(&floats)],
                "fixed": ["[2, 2]", sha(&fixed)],
            })
        })
        .collect();
    writer.finish().unwrap();
    seen
}
