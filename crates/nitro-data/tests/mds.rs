//! What users of the MDS format rely on: what is written is read back, damage is named and counted,
//! bytes that are no dataset are errors and never panics.

use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use nitro_data::DataError;
use nitro_data::mds::{
    Array, Column, Compression, Dataset, DatasetOptions, Dtype, Encoding, Hash, INDEX, Index,
    OnDamage, Pixels, Scalar, Schema, Value, Verify, Writer, WriterOptions, merge_index,
};
use proptest::prelude::*;
use serde_json::json;

/// One column of every kind, with a value.
fn kinds() -> Vec<(&'static str, &'static str, Value)> {
    let array = |shape: &[usize], dtype: Dtype| {
        let count = shape.iter().product::<usize>() * dtype.size();
        Value::Array(Array {
            dtype,
            shape: shape.to_vec(),
            data: (0..count).map(|i| i as u8 % 60).collect(),
        })
    };
    let jpeg = Value::Image(vec![0xff, 0xd8, 0xff, 1, 2]);
    vec![
        ("a", "bytes", Value::Bytes(vec![0, 255, 3])),
        ("b", "str", Value::Str("ein Füchslein \u{1f98a}".into())),
        ("c", "int", Value::Int(-5)),
        ("d", "uint8", Value::Scalar(Scalar::U8(200))),
        (
            "e",
            "float16",
            Value::Scalar(Scalar::F16(f16::from_f32(1.5))),
        ),
        ("f", "float64", Value::Scalar(Scalar::F64(-0.1))),
        ("g", "ndarray", array(&[2, 3], Dtype::F32)),
        ("h", "ndarray:int16", array(&[300, 1], Dtype::I16)),
        ("i", "ndarray:uint8:4,2", array(&[4, 2], Dtype::U8)),
        (
            "j",
            "json",
            Value::Json(json!({"k": [1, 2.5, null], "ü": "é"})),
        ),
        (
            "k",
            "str_int",
            Value::Digits("-123456789012345678901".into()),
        ),
        ("l", "str_float", Value::Digits("1e-3".into())),
        ("m", "str_decimal", Value::Digits("0.10".into())),
        (
            "n",
            "pil",
            Value::Pixels(Pixels {
                width: 2,
                height: 1,
                mode: "RGB".into(),
                data: vec![1, 2, 3, 4, 5, 6],
            }),
        ),
        ("o", "jpeg", jpeg.clone()),
        ("p", "png", Value::Image(b"\x89PNG\r\n\x1a\n".to_vec())),
        (
            "q",
            "list[jpeg]",
            Value::List(vec![jpeg.clone(), jpeg.clone()]),
        ),
        ("r", "jpeg_array", Value::List(vec![jpeg])),
    ]
}

fn captions(dir: &Path, count: usize, options: WriterOptions) -> Index {
    let schema = Schema::new([("caption", "str"), ("n", "int")]).unwrap();
    let mut writer = Writer::create(dir, schema, options).unwrap();
    for i in 0..count {
        let caption = Value::Str(format!("caption {i}"));
        writer
            .write(&[("n", Value::Int(i as i64)), ("caption", caption)])
            .unwrap();
    }
    writer.finish().unwrap()
}

fn small() -> WriterOptions {
    WriterOptions {
        size_limit: 400,
        ..Default::default()
    }
}

fn open(dir: &Path, verify: Verify, on_damage: OnDamage) -> Dataset {
    let options = DatasetOptions {
        verify,
        on_damage,
        scratch: None,
    };
    Dataset::open_all(&[dir.to_owned()], options).unwrap()
}

#[test]
fn every_kind_of_column_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    for (i, compression) in [None, Some("zstd"), Some("zstd:19")]
        .into_iter()
        .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let kinds = kinds();
        // Given out of order: columns are stored sorted by name.
        let schema = Schema::new(kinds.iter().rev().map(|(n, e, _)| (*n, *e))).unwrap();
        let options = WriterOptions {
            compression: compression.map(|c| c.parse::<Compression>().unwrap()),
            hashes: vec![Hash::Xxh64, Hash::Sha1],
            size_limit: 4000,
        };
        let mut writer = Writer::create(&out, schema, options).unwrap();
        let values: Vec<(&str, Value)> = kinds.iter().map(|(n, _, v)| (*n, v.clone())).collect();
        (0..5).for_each(|_| writer.write(&values).unwrap());
        let index = writer.finish().unwrap();
        assert!(index.shards.len() > 1);
        let dataset = open(&out, Verify::Hashes, OnDamage::Fail);
        assert_eq!(dataset.len(), 5);
        for index in 0..5 {
            let sample = dataset.sample(index).unwrap();
            for (name, encoding, value) in &kinds {
                assert_eq!(sample.value(name).unwrap(), *value, "{encoding}");
            }
        }
        assert!(dataset.check(|_| ()).unwrap().is_empty());
        // A complete dataset is not overwritten.
        let schema = Schema::new([("x", "int")]).unwrap();
        assert!(Writer::create(&out, schema, small()).is_err());
    }
}

#[test]
fn merged_folders_read_as_one() {
    let dir = tempfile::tempdir().unwrap();
    captions(&dir.path().join("0"), 30, small());
    captions(&dir.path().join("1"), 11, small());
    merge_index(dir.path(), &[PathBuf::from("0"), PathBuf::from("1")]).unwrap();
    let merged = Dataset::open(dir.path()).unwrap();
    let both = [dir.path().join("0"), dir.path().join("1")];
    let both = Dataset::open_all(&both, DatasetOptions::default()).unwrap();
    assert_eq!((merged.len(), both.len()), (41, 41));
    assert_eq!(both.shard_sizes().len(), 2);
    for index in [0, 29, 30, 40] {
        let caption = format!("caption {}", index % 30);
        assert_eq!(
            merged.sample(index).unwrap().text("caption").unwrap(),
            caption
        );
        assert_eq!(
            both.sample(index).unwrap().text("caption").unwrap(),
            caption
        );
    }
    assert!(merged.sample(41).is_err());
    merged.require(&["caption", "n"]).unwrap();
    let error = merged.require(&["latents_512"]).unwrap_err().to_string();
    assert!(
        error.contains("latents_512") && error.contains("caption, n"),
        "{error}"
    );
}

/// Every way in which a shard can be damaged, and what is said of it.
#[test]
fn a_damaged_shard_is_named_and_if_asked_skipped_and_counted() {
    type Harm = (&'static str, fn(&Path), &'static str);
    let harms: [Harm; 5] = [
        (
            "missing",
            |path| fs::remove_file(path).unwrap(),
            "No such file",
        ),
        (
            "cut off",
            |path| {
                let bytes = fs::read(path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
            },
            "its index says",
        ),
        ("a flipped bit", |path| flip(path, 370), "sha1"),
        (
            "another count",
            |path| flip(path, 0),
            "samples, its index says",
        ),
        ("a wild offset", |path| flip(path, 11), "offset"),
    ];
    for (name, harm, said) in harms {
        let dir = tempfile::tempdir().unwrap();
        let options = WriterOptions {
            hashes: vec![Hash::Sha1],
            ..small()
        };
        let index = captions(dir.path(), 40, options);
        let lost = index.shards[1].samples;
        harm(&dir.path().join("shard.00001.mds"));
        let verify = match name {
            "a flipped bit" => Verify::Hashes,
            _ => Verify::Structure,
        };
        let strict = open(dir.path(), verify, OnDamage::Fail);
        let first = index.shards[0].samples;
        assert!(strict.sample(first - 1).is_ok());
        let error = strict.sample(first).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, DataError::Damaged { .. }), "{name}: {text}");
        assert!(
            text.contains("shard.00001.mds") && text.contains(said),
            "{name}: {text}"
        );

        let lenient = open(dir.path(), verify, OnDamage::Skip);
        let read = |i| {
            lenient
                .decoded(i, |s| s.text("caption").map(str::to_owned))
                .unwrap()
        };
        let found: Vec<String> = (0..lenient.len()).filter_map(read).collect();
        assert_eq!(found.len(), 40 - lost, "{name}");
        let damage = lenient.damage();
        assert_eq!((damage.len(), damage[0].samples), (1, lost), "{name}");
        assert!(damage[0].shard.ends_with("shard.00001.mds"));
        assert_eq!(
            open(dir.path(), verify, OnDamage::Fail)
                .check(|_| ())
                .unwrap(),
            damage
        );
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_value_that_is_not_of_its_encoding_counts_as_damage() {
    let dir = tempfile::tempdir().unwrap();
    let schema = Schema::new([("caption", "str")]).unwrap();
    let mut writer = Writer::create(dir.path(), schema, WriterOptions::default()).unwrap();
    for bytes in [b"fine".to_vec(), vec![0xff, 0xfe]] {
        writer.write(&[("caption", Value::Bytes(bytes))]).unwrap();
    }
    writer.finish().unwrap();
    let decode = |dataset: &Dataset, i| dataset.decoded(i, |s| s.value("caption"));
    let strict = open(dir.path(), Verify::Structure, OnDamage::Fail);
    assert!(decode(&strict, 0).is_ok());
    let error = decode(&strict, 1).unwrap_err().to_string();
    assert!(
        error.contains("caption") && error.contains("UTF-8"),
        "{error}"
    );
    let lenient = open(dir.path(), Verify::Structure, OnDamage::Skip);
    assert_eq!(decode(&lenient, 1).unwrap(), None);
    assert_eq!(lenient.damage()[0].samples, 1);
}

#[test]
fn what_cannot_be_written_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let schema = Schema::new([("caption", "str"), ("n", "int")]).unwrap();
    let mut writer = Writer::create(dir.path(), schema, small()).unwrap();
    let caption = || ("caption", Value::Str("x".into()));
    let bad: [&[(&str, Value)]; 4] = [
        &[caption()],
        &[caption(), ("n", Value::Int(1)), ("z", Value::Int(1))],
        &[caption(), ("n", Value::Str("1".into()))],
        &[caption(), ("n", Value::Bytes(vec![1]))],
    ];
    for values in bad {
        assert!(writer.write(values).is_err(), "{values:?}");
    }
    assert!(Schema::new([("a", "int"), ("a", "str")]).is_err());
    assert!(Schema::new([("a", "tensor")]).is_err());
    assert!(Schema::new([]).is_err());
    assert!("zstd:99".parse::<Compression>().is_err() && "gz".parse::<Compression>().is_err());
}

#[test]
fn an_index_cannot_reach_out_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    captions(dir.path(), 3, small());
    let text = fs::read_to_string(dir.path().join(INDEX)).unwrap();
    for name in ["/etc/passwd", "../secret", ""] {
        let evil = text.replace("shard.00000.mds", name);
        assert!(Index::parse(evil.as_bytes()).is_err(), "{name}");
    }
    for (from, to) in [
        ("\"version\": 2", "\"version\": 3"),
        ("\"mds\"", "\"xsv\""),
        ("\"int\"", "\"uint8\""),
        ("\"str\"", "\"wishes\""),
    ] {
        assert!(
            Index::parse(text.replace(from, to).as_bytes()).is_err(),
            "{to}"
        );
    }
}

proptest! {
    #[test]
    fn encodings_decode_what_they_encode_and_survive_anything(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        which in 0usize..18,
    ) {
        let (_, name, _) = kinds()[which].clone();
        let encoding: Encoding = name.parse().unwrap();
        prop_assert_eq!(encoding.to_string(), name);
        if let Ok(value) = encoding.decode(&bytes) {
            // JSON may be spelled otherwise; all else is one to one but arrays of empty shape.
            let again = encoding.encode(&value).map(|b| encoding.decode(&b).unwrap());
            if let Ok(again) = again {
                // NaN differs from itself, but prints alike.
                let print = |value: &Value| format!("{:?}", value);
                prop_assert_eq!(print(&again), print(&value));
            }
        }
    }

    #[test]
    fn names_of_encodings_never_panic(name in "[a-z0-9:,\\[\\]]{0,20}") {
        if let Ok(encoding) = name.parse::<Encoding>() {
            let again: Encoding = encoding.to_string().parse().unwrap();
            prop_assert_eq!(again, encoding);
        }
    }

    #[test]
    fn a_shard_of_any_bytes_is_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        count in 0usize..6,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut index = captions(dir.path(), 3, WriterOptions::default());
        if bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&(count as u32).to_le_bytes());
        }
        index.shards[0].samples = count.max(1);
        index.shards[0].raw_data.bytes = bytes.len() as u64;
        index.write(dir.path()).unwrap();
        fs::write(dir.path().join("shard.00000.mds"), bytes).unwrap();
        let dataset = open(dir.path(), Verify::Structure, OnDamage::Fail);
        for i in 0..dataset.len() {
            if let Ok(sample) = dataset.sample(i) {
                let all = |c: &Column| sample.bytes(&c.name).unwrap().len();
                sample.schema().columns().iter().map(all).sum::<usize>();
            }
        }
    }

    #[test]
    fn an_index_of_any_json_is_read_or_refused(text in "\\PC{0,80}") {
        let _ = Index::parse(text.as_bytes());
        let _ = Index::parse(format!("{{\"version\": 2, \"shards\": [{text}]}}").as_bytes());
    }
}
