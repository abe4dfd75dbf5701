//! Checkpoints that PyTorch itself wrote (`data/make_torch_checkpoints.py`).

use std::path::{Path, PathBuf};

use nitro_models::{WeightError, WeightFiles};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

#[test]
fn every_kind_of_float_tensor_is_read() {
    let weights = WeightFiles::open(data("state_dict.pt")).unwrap();
    let ramp: Vec<f32> = (0..12).map(|i| i as f32 / 4.0).collect();
    let read = |name: &str| weights.read(name).unwrap();
    for name in ["plain", "half", "brain"] {
        assert_eq!(read(name), (vec![3, 4], ramp.clone()), "{name}");
    }
    let transposed = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11].map(|i| ramp[i]);
    assert_eq!(read("transposed"), (vec![4, 3], transposed.to_vec()));
    let view = [5, 6, 9, 10].map(|i| ramp[i]);
    assert_eq!(read("view"), (vec![2, 2], view.to_vec()));
    let twice = ramp.iter().map(|x| 2.0 * x).collect();
    assert_eq!(read("parameter"), (vec![3, 4], twice));
    assert_eq!(read("scalar"), (vec![], vec![2.5]));
    assert_eq!(read("empty"), (vec![0, 4], vec![]));
    // Integers are known but are no weights.
    assert!(matches!(
        weights.read("buffer"),
        Err(WeightError::Dtype { .. })
    ));
    weights.finish(&[]).unwrap();
}

#[test]
fn a_training_checkpoint_gives_its_state_dict() {
    let weights = WeightFiles::open(data("training.pt")).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["bias", "weight"]);
    assert_eq!(
        weights.read("bias").unwrap(),
        (vec![3], vec![1.0, -1.0, 0.5])
    );
    assert_eq!(weights.shape("weight"), Some(&[3, 4][..]));
}

#[test]
fn damaged_and_older_checkpoints_are_told() {
    let bytes = std::fs::read(data("training.pt")).unwrap();
    let whole = |bytes: &[u8]| WeightFiles::from_bytes("cut.pt", bytes.to_vec());
    for end in [5, 100, bytes.len() / 2, bytes.len() - 1] {
        let error = whole(&bytes[..end]).unwrap_err().to_string();
        assert!(error.contains("cut.pt"), "{error}");
    }
    // Any single byte may be damaged without worse than an error.
    for at in (0..bytes.len()).step_by(7) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0xff;
        let _ = whole(&damaged).map(|weights| weights.read("weight"));
    }
    let error = WeightFiles::open(data("legacy.pt"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("torch.save"), "{error}");
}
