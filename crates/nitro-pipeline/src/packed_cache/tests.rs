use std::sync::Barrier;
use std::time::SystemTime;

use image::RgbImage;
use nitro_models::{DType, LoraLayer, LoraSpec, WeightFiles, save_peft};

use super::*;
use crate::{Pipeline, Request};

/// A model folder of its own, which tests may change.
fn model(folder: &Path) -> PathBuf {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/miniature");
    let place = folder.join("model");
    copy(&shipped, &place);
    place
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn picture(model: &Path, cache: PackedCache, precision: Precision) -> RgbImage {
    let builder = Pipeline::builder(model).precision(precision);
    let pipeline = builder.packed_cache(cache).load().unwrap();
    let request = Request::new("a red circle").seed(3).steps(2);
    let mut output = pipeline.generate(&request).unwrap();
    output.images.remove(0).image
}

/// The files in a folder, with what they hold and when they were used.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>, SystemTime)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let used = fs::metadata(&path).unwrap().modified().unwrap();
            (path.clone(), fs::read(&path).unwrap(), used)
        })
        .collect();
    files.sort();
    files
}

#[test]
fn pictures_are_the_same_with_and_without_and_the_second_start_writes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let model = model(place.path());
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        let folder = place.path().join(precision.name());
        let cache = || PackedCache::in_folder(&folder, 0, DISK);
        let expected = picture(&model, PackedCache::off(), precision);
        assert!(picture(&model, cache(), precision) == expected);
        let written = files(&folder);
        // The transformer, the text encoder and the decoder.
        assert_eq!(written.len(), 3);
        assert!(picture(&model, cache(), precision) == expected);
        for ((path, old, before), (again, new, after)) in written.iter().zip(files(&folder)) {
            assert!(*path == again && *old == new);
            // It was used.
            assert!(after > *before);
        }
    }
}

#[test]
fn weights_that_changed_are_packed_anew() {
    let place = tempfile::tempdir().unwrap();
    let model = model(place.path());
    let folder = place.path().join("cache");
    let cache = || PackedCache::in_folder(&folder, 0, DISK);
    picture(&model, cache(), Precision::F32);
    let before = files(&folder).len();

    // Another file of the same size under the same name.
    let card: serde_json::Value =
        serde_json::from_slice(&fs::read(model.join("nitro.json")).unwrap()).unwrap();
    let transformer = card["variants"][0]["transformer"].as_str().unwrap();
    let path = model.join(transformer);
    let mut weights = fs::read(&path).unwrap();
    let last = weights.len() - 4..;
    weights[last].copy_from_slice(&0.25_f32.to_le_bytes());
    fs::remove_file(&path).unwrap();
    fs::write(&path, weights).unwrap();
    let expected = picture(&model, PackedCache::off(), Precision::F32);
    assert!(picture(&model, cache(), Precision::F32) == expected);
    assert_eq!(files(&folder).len(), before + 1);
}

#[test]
fn a_damaged_file_is_replaced_and_an_unusable_folder_does_no_harm() {
    let place = tempfile::tempdir().unwrap();
    let model = model(place.path());
    let folder = place.path().join("cache");
    let cache = || PackedCache::in_folder(&folder, 0, DISK);
    let expected = picture(&model, cache(), Precision::Bf16);
    let written = files(&folder);
    for (path, bytes, _) in &written {
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }
    assert!(picture(&model, cache(), Precision::Bf16) == expected);
    for ((path, old, _), (again, new, _)) in written.iter().zip(files(&folder)) {
        assert!(*path == again && *old == new);
    }

    // Below a file there can be no folder, for root neither.
    let below = PackedCache::in_folder(written[0].0.join("below"), 0, DISK);
    assert!(picture(&model, below, Precision::Bf16) == expected);
    // What would not fit is not written.
    let small = place.path().join("small");
    let cache = PackedCache::in_folder(&small, 0, 1000);
    assert!(picture(&model, cache, Precision::Bf16) == expected);
    assert!(!small.exists());
    // Nor what is packed in no time.
    let cache = PackedCache::in_folder(&small, WORTH_A_FILE, DISK);
    assert!(picture(&model, cache, Precision::Bf16) == expected);
    assert!(!small.exists());
}

#[test]
fn starts_at_the_same_time_do_no_harm() {
    let place = tempfile::tempdir().unwrap();
    let model = model(place.path());
    let folder = place.path().join("cache");
    let expected = picture(&model, PackedCache::off(), Precision::Int8);
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        let start = || {
            barrier.wait();
            let cache = PackedCache::in_folder(&folder, 0, DISK);
            picture(&model, cache, Precision::Int8)
        };
        let starts: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        for start in starts {
            assert!(start.join().unwrap() == expected);
        }
    });
    assert_eq!(files(&folder).len(), 3);
    let cache = PackedCache::in_folder(&folder, 0, DISK);
    assert!(picture(&model, cache, Precision::Int8) == expected);
}

#[test]
fn adapters_that_a_user_tries_leave_no_files() {
    let place = tempfile::tempdir().unwrap();
    let model = model(place.path());
    let weights = WeightFiles::open(model.join("transformer.safetensors")).unwrap();
    let matrix = |name: &&str| name.ends_with(".weight") && weights.shape(name).unwrap().len() == 2;
    let name = weights.names().find(matrix).unwrap();
    let (shape, _) = weights.read(name).unwrap();
    let module = name.strip_suffix(".weight").unwrap();
    let adapter = place.path().join("adapter");
    let spec = LoraSpec {
        rank: 1,
        alpha: 1.0,
        targets: vec![module.to_owned()],
        base_model: "miniature".to_owned(),
    };
    let (down, up) = (vec![1.0; shape[1]], vec![1.0; shape[0]]);
    let layer = LoraLayer {
        module,
        down: &down,
        up: &up,
    };
    save_peft(&adapter, &spec, &[layer], DType::F32).unwrap();

    let folder = place.path().join("cache");
    let cache = PackedCache::in_folder(&folder, 0, DISK);
    let builder = Pipeline::builder(&*model).lora(adapter, 1.0);
    builder.packed_cache(cache).load().unwrap();
    // The text encoder and the decoder.
    assert_eq!(files(&folder).len(), 2);
}
