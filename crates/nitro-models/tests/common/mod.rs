//! Reading golden cases.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::WeightFiles;
use serde_json::Value;

pub(crate) struct Case {
    pub(crate) folder: PathBuf,
    pub(crate) json: Value,
    pub(crate) worst: f64,
    failures: Vec<String>,
}

impl Case {
    pub(crate) fn all(suite: &str) -> Vec<Self> {
        let root = std::env::var_os("NITRO_GOLDEN")
            .map(PathBuf::from)
            .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
        let mut folders: Vec<_> = std::fs::read_dir(root.join(suite))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("case.json").exists())
            .collect();
        folders.sort();
        folders.into_iter().map(Self::open).collect()
    }

    pub(crate) fn open(folder: PathBuf) -> Self {
        let json = std::fs::read_to_string(folder.join("case.json")).unwrap();
        let json = serde_json::from_str(&json).unwrap();
        Self {
            folder,
            json,
            worst: 0.0,
            failures: vec![],
        }
    }

    pub(crate) fn files(&self, name: &str) -> WeightFiles {
        WeightFiles::open(self.folder.join(format!("{name}.safetensors"))).unwrap()
    }

    pub(crate) fn check(&mut self, name: &str, found: Vec<f32>, expected: &[f32], limit: f64) {
        assert_eq!(found.len(), expected.len(), "{name}");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut found.iter().zip(expected).map(|(a, b)| (a - b) as f64));
        let error = error / norm(&mut expected.iter().map(|&x| x as f64)).max(1e-30);
        self.worst = self.worst.max(error);
        if error.is_nan() || error > limit {
            self.failures
                .push(format!("{name}: {error:.2e} > {limit:.0e}"));
        }
    }

    pub(crate) fn finish(self) {
        println!("{}: worst {:.2e}", self.folder.display(), self.worst);
        assert!(self.failures.is_empty(), "{:?}", self.failures);
    }
}

pub(crate) fn tensor<const D: usize>(files: &WeightFiles, name: &str) -> Tensor<D> {
    let (shape, data) = files.read(name).unwrap();
    Tensor::from_data(TensorData::new(data, shape), &Device::flex())
}

pub(crate) fn data<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}
