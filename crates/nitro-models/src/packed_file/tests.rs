use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_ops::Precision;

use super::*;
use crate::dcae::{DcaeConfig, Decoder};
use crate::emmdit::{Emmdit, EmmditConfig};
use crate::{ParameterSource, ParameterSpec, Params, RandomInit};

/// Initialised weights that count how many matrices are read.
#[derive(Default)]
struct Counting(AtomicUsize);

impl ParameterSource for Counting {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        if spec.shape.len() >= 2 {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        RandomInit::new(1).parameter(spec, device)
    }

    fn contains(&self, _: &str) -> bool {
        false
    }

    fn verify(&self, _: &ParameterSpec) -> Result<(), WeightError> {
        Ok(())
    }
}

fn emmdit_config() -> EmmditConfig {
    EmmditConfig {
        sample_size: 8,
        in_channels: 4,
        out_channels: 4,
        heads: 2,
        head_dim: 8,
        caption_channels: 6,
        pos_embed_max_size: 12,
        block_groups: [1, 2, 1],
        use_sub_attn: false,
        ..EmmditConfig::nitro_e_512()
    }
}

fn ramp<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// What a transformer and a decoder compute whose packed weights pass through `file`, to the bit, and
/// how many matrices were read to make them.
fn outputs(file: Option<&PackedFile>, precision: Precision) -> (Vec<u32>, usize) {
    let source = Counting::default();
    let params = Params::new(&source, &Device::flex(), precision);
    let params = params.for_inference().with_packed(file);
    let emmdit = Emmdit::new(&emmdit_config(), &params.sub("transformer")).unwrap();
    let decoder = Decoder::new(&DcaeConfig::miniature(), &params).unwrap();
    let velocity = emmdit.forward(ramp([1, 4, 8, 8]), ramp([1, 5, 6]), &[300.0]);
    let picture = decoder.decode(ramp([1, 8, 4, 4]));
    let mut bits = Vec::new();
    for tensor in [velocity.unwrap(), picture.unwrap()] {
        let values = tensor.into_data().try_into_vec::<f32>().unwrap();
        bits.extend(values.iter().map(|x| x.to_bits()));
    }
    (bits, source.0.into_inner())
}

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Int8];

#[test]
fn a_second_start_computes_the_same_bits_and_reads_no_packed_matrix() {
    let folder = tempfile::tempdir().unwrap();
    for precision in PRECISIONS {
        let path = folder.path().join(precision.name());
        let (expected, read) = outputs(None, precision);

        let first = PackedFile::open(&path, "key");
        assert_eq!(outputs(Some(&first), precision), (expected.clone(), read));
        assert!(!first.was_enough());
        first.save().unwrap();

        let second = PackedFile::open(&path, "key");
        let (again, few) = outputs(Some(&second), precision);
        assert!(again == expected, "{precision:?} differs");
        assert!(second.was_enough());
        assert!(few < read / 2, "{few} of {read} matrices were read again");
        assert_eq!(second.bytes(), first.bytes());
        let copying = PackedFile {
            copies: true,
            ..PackedFile::open(&path, "key")
        };
        assert!(outputs(Some(&copying), precision).0 == expected);

        // There is nothing to write.
        fs::remove_file(&path).unwrap();
        second.save().unwrap();
        assert!(!path.exists());
        // The model was still there when its file was gone.
        assert_eq!(outputs(Some(&second), precision).0, expected);
    }
}

#[test]
fn another_key_or_precision_is_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let file = PackedFile::open(&path, "these weights");
    outputs(Some(&file), Precision::Bf16);
    file.save().unwrap();

    let other = PackedFile::open(&path, "other weights");
    outputs(Some(&other), Precision::Bf16);
    assert!(!other.was_enough());

    let other = PackedFile::open(&path, "these weights");
    let (expected, _) = outputs(None, Precision::F32);
    assert_eq!(outputs(Some(&other), Precision::F32).0, expected);
    assert!(!other.was_enough());
}

#[test]
fn a_damaged_file_is_as_good_as_none_and_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let (expected, _) = outputs(None, Precision::Int8);
    let file = PackedFile::open(&path, "key");
    outputs(Some(&file), Precision::Int8);
    file.save().unwrap();
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    assert!((header + 8).is_multiple_of(ALIGN));

    let holes = [&whole[..header + 8], &vec![0; whole.len() - header - 8]].concat();
    let half_written = [&whole[..whole.len() - 64], &[0; 64]].concat();
    let renamed = String::from_utf8_lossy(&whole[..header + 8]).replacen("linear", "lineal", 1);
    let renamed = [renamed.as_bytes(), &whole[header + 8..]].concat();
    let cut = whole[..whole.len() - 1].to_vec();
    let longer = [&whole[..], &[0; 64]].concat();
    let damaged = [
        holes,
        half_written,
        renamed,
        cut,
        longer,
        whole[..header / 2].to_vec(),
        b"not a safetensors file".to_vec(),
        Vec::new(),
    ];
    for (case, bytes) in damaged.iter().enumerate() {
        fs::write(&path, bytes).unwrap();
        let file = PackedFile::open(&path, "key");
        assert!(
            outputs(Some(&file), Precision::Int8).0 == expected,
            "{case}"
        );
        assert!(!file.was_enough(), "{case}");
        drop(file);
        let file = PackedFile::open(&path, "key");
        outputs(Some(&file), Precision::Int8);
        file.save().unwrap();
        assert!(fs::read(&path).unwrap() == whole, "{case}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_of_saving_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = PackedFile::open(folder.path().join("missing/packed"), "key");
    outputs(Some(&file), Precision::F32);
    assert!(matches!(file.save(), Err(WeightError::Io { .. })));
}
