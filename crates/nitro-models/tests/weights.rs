//! Weight files: what is read, what is refused and how, and LoRA adapters merged over them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use nitro_models::{
    DType, Init, LoraAdapter, Merged, ParameterSource, ParameterSpec, WeightError, WeightFiles,
    save_safetensors,
};
use serde_json::json;

type Named<'a> = (&'a str, &'a [usize], &'a [f32]);

fn write(path: &Path, tensors: &[Named<'_>], dtype: DType) -> PathBuf {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| (name.to_string(), shape.to_vec(), *values))
        .collect();
    let metadata = HashMap::from([("made by".to_owned(), "a test".to_owned())]);
    save_safetensors(path, &tensors, &metadata, dtype).unwrap();
    path.to_owned()
}

fn spec(name: &str, shape: &[usize]) -> ParameterSpec {
    ParameterSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        init: Init::Zeros,
        trainable: true,
    }
}

fn values(source: &dyn ParameterSource, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = source
        .parameter(&spec(name, shape), &Device::flex())
        .unwrap();
    tensor.into_data().try_into_vec().unwrap()
}

#[test]
fn what_is_written_is_read_back_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let numbers = [1.0, -2.5, 0.15625, 3.0, 0.0, -0.5]; // exact in all three formats
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let path = write(
            &dir.path().join("w.safetensors"),
            &[("a", &[2, 3], &numbers)],
            dtype,
        );
        let weights = WeightFiles::open(&path).unwrap();
        assert_eq!(weights.read("a").unwrap(), (vec![2, 3], numbers.to_vec()));
        assert_eq!(values(&weights, "a", &[2, 3]), numbers);
        assert_eq!(weights.metadata()["made by"], "a test");
        let bytes = fs::read(&path).unwrap();
        let held = WeightFiles::from_bytes("inside", bytes).unwrap();
        assert_eq!(values(&held, "a", &[2, 3]), numbers);
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "no file written aside is left behind");
}

#[test]
fn later_files_replace_tensors_of_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    let base = write(
        &dir.path().join("base.safetensors"),
        &[("a", &[2], &[1.0, 2.0]), ("b", &[1], &[3.0])],
        DType::F32,
    );
    let over = write(
        &dir.path().join("over.safetensors"),
        &[("a", &[2], &[5.0, 6.0])],
        DType::F16,
    );
    let weights = WeightFiles::open_all(&[base, over]).unwrap();
    assert_eq!(values(&weights, "a", &[2]), [5.0, 6.0]);
    assert_eq!(values(&weights, "b", &[1]), [3.0]);
}

#[test]
fn a_folder_is_read_by_its_index() {
    let dir = tempfile::tempdir().unwrap();
    let part = |n: &str| {
        dir.path()
            .join(format!("model-0000{n}-of-00002.safetensors"))
    };
    write(&part("1"), &[("a", &[1], &[1.0])], DType::F32);
    write(&part("2"), &[("b", &[1], &[2.0])], DType::F32);
    let two = WeightFiles::open(dir.path()).unwrap_err().to_string();
    assert!(two.contains("2 .safetensors files and no index"), "{two}");
    let index = json!({ "weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors" } });
    fs::write(
        dir.path().join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    let weights = WeightFiles::open(dir.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    fs::remove_file(part("2")).unwrap();
    let missing = WeightFiles::open(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("00002-of-00002"), "{missing}");
}

#[test]
fn errors_name_the_file_the_tensor_and_both_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        &dir.path().join("w.safetensors"),
        &[("a", &[2, 1], &[1.0, 2.0])],
        DType::F32,
    );
    let weights = WeightFiles::open(&path).unwrap();
    let error = |spec: ParameterSpec| {
        weights
            .parameter(&spec, &Device::flex())
            .unwrap_err()
            .to_string()
    };
    let shape = error(spec("a", &[1, 2]));
    for part in ["w.safetensors", "`a`", "[2, 1]", "[1, 2]"] {
        assert!(shape.contains(part), "{shape}");
    }
    assert!(error(spec("b", &[1])).contains("no tensor `b`"));
    assert!(matches!(weights.finish(&["a"]), Ok(())));

    let unread = WeightFiles::open(&path).unwrap();
    assert!(
        unread
            .finish(&[])
            .unwrap_err()
            .to_string()
            .contains("no place for: a")
    );
    unread.read("a").unwrap();
    unread.finish(&[]).unwrap();
}

#[test]
fn damaged_files_are_told_from_missing_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        &dir.path().join("w.safetensors"),
        &[("a", &[64], &[1.0; 64])],
        DType::F32,
    );
    let whole = fs::read(&path).unwrap();
    let cuts = [0, 4, 20, whole.len() - 1];
    for damaged in cuts
        .map(|length| whole[..length].to_vec())
        .into_iter()
        .chain([
            [&[0xff; 8], &whole[8..]].concat(),
            [&whole[..8], &b"?"[..], &whole[9..]].concat(),
            [&whole[..], &[0][..]].concat(),
        ])
    {
        fs::write(&path, &damaged).unwrap();
        let error = WeightFiles::open(&path).unwrap_err();
        assert!(matches!(error, WeightError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("w.safetensors"), "{error}");
    }
    let error = WeightFiles::open(dir.path().join("none.safetensors")).unwrap_err();
    assert!(matches!(error, WeightError::Io { .. }), "{error}");
}

#[test]
fn tensors_that_are_no_floats_are_refused() {
    let header = br#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}} "#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat();
    let weights = WeightFiles::from_bytes("numbers", bytes).unwrap();
    let error = weights.read("a").unwrap_err().to_string();
    assert!(error.contains("I64"), "{error}");
}

#[test]
fn data_of_another_size_than_its_shape_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [("a".to_owned(), vec![3], &[1.0, 2.0][..])];
    let path = dir.path().join("w.safetensors");
    save_safetensors(&path, &tensors, &HashMap::new(), DType::F32).unwrap_err();
    assert!(!path.exists());
}

/// An adapter over `base` weights `layer.proj.weight [2, 3]` and `other.weight [2, 2]`.
fn adapter(
    dir: &Path,
    config: serde_json::Value,
    tensors: &[Named<'_>],
) -> Result<LoraAdapter, WeightError> {
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    write(&dir.join("adapter_model.safetensors"), tensors, DType::F32);
    LoraAdapter::open(dir)
}

const DOWN: Named<'_> = (
    "base_model.model.layer.proj.lora_A.weight",
    &[1, 3],
    &[1.0, 2.0, 3.0],
);
const UP: Named<'_> = (
    "base_model.model.layer.proj.lora_B.weight",
    &[2, 1],
    &[1.0, -1.0],
);

#[test]
fn adapters_are_added_at_their_scale() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        &dir.path().join("base.safetensors"),
        &[
            ("layer.proj.weight", &[2, 3], &[0.5; 6]),
            ("other.weight", &[1], &[7.0]),
        ],
        DType::F32,
    );
    let base = WeightFiles::open(&path).unwrap();
    let merged = |config: serde_json::Value, strength: f64| {
        let adapter = adapter(dir.path(), config, &[DOWN, UP]).unwrap();
        let merged = Merged::new(&base, [(&adapter, strength)]).unwrap();
        assert_eq!(values(&merged, "other.weight", &[1]), [7.0]);
        values(&merged, "layer.proj.weight", &[2, 3])
    };
    let scaled = |scale: f32| {
        [1.0, 2.0, 3.0, -1.0, -2.0, -3.0]
            .map(|x| 0.5 + scale * x)
            .to_vec()
    };
    assert_eq!(merged(json!({ "r": 1, "lora_alpha": 2 }), 1.0), scaled(2.0));
    assert_eq!(merged(json!({ "r": 1, "lora_alpha": 2 }), 0.5), scaled(1.0));
    let patterns = json!({ "r": 4, "lora_alpha": 2, "use_rslora": true,
        "rank_pattern": { "proj": 1 }, "alpha_pattern": { "layer.proj": 3, "j": 9 } });
    assert_eq!(merged(patterns, 1.0), scaled(3.0));
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let plain = json!({ "r": 1, "lora_alpha": 2 });
    let refused = |config: serde_json::Value, tensors: &[Named<'_>]| {
        adapter(dir.path(), config, tensors)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(json!({ "r": 2, "lora_alpha": 2 }), &[DOWN, UP]).contains("rank 2"));
    assert!(refused(plain.clone(), &[DOWN]).contains("lora_B"));
    assert!(refused(json!({ "r": 1 }), &[DOWN, UP]).contains("lora_alpha"));
    let dora = json!({ "r": 1, "lora_alpha": 2, "use_dora": true });
    assert!(refused(dora, &[DOWN, UP]).contains("use_dora"));
    let stray: Named<'_> = ("base_model.model.layer.magnitude", &[1], &[1.0]);
    assert!(refused(plain.clone(), &[DOWN, UP, stray]).contains("layer.magnitude"));

    let path = write(
        &dir.path().join("base.safetensors"),
        &[("x", &[1], &[0.0])],
        DType::F32,
    );
    let base = WeightFiles::open(&path).unwrap();
    let foreign = adapter(dir.path(), plain.clone(), &[DOWN, UP]).unwrap();
    let error = Merged::new(&base, [(&foreign, 1.0)])
        .unwrap_err()
        .to_string();
    assert!(error.contains("layer.proj.weight"), "{error}");

    let path = write(
        &dir.path().join("base.safetensors"),
        &[("layer.proj.weight", &[2, 2], &[0.0; 4])],
        DType::F32,
    );
    let base = WeightFiles::open(&path).unwrap();
    let merged = Merged::new(&base, [(&foreign, 1.0)]).unwrap();
    let spec = spec("layer.proj.weight", &[2, 2]);
    let error = merged
        .parameter(&spec, &Device::flex())
        .unwrap_err()
        .to_string();
    assert!(error.contains("[2, 3]"), "{error}");
}
