//! The layout of the golden vectors: cases, and the tensors of their files.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::WeightFiles;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::compare::Report;

/// `NITRO_GOLDEN`, or the project's own vectors.
pub(crate) fn golden_dir() -> PathBuf {
    match std::env::var_os("NITRO_GOLDEN") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
    }
}

/// A case: a folder with a `case.json`.
pub(crate) struct Case {
    pub(crate) suite: String,
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) json: Value,
}

impl Case {
    /// All cases below `root`, which has a folder per suite, in name order.
    pub(crate) fn all(root: &Path) -> Result<Vec<Self>> {
        let mut cases = Vec::new();
        for suite in folders(root)? {
            for dir in folders(&suite)? {
                if dir.join("case.json").is_file() {
                    cases.push(Self::open(dir)?);
                }
            }
        }
        Ok(cases)
    }

    fn open(dir: PathBuf) -> Result<Self> {
        let path = dir.join("case.json");
        let json: Value = serde_json::from_slice(&fs::read(&path)?)
            .with_context(|| path.display().to_string())?;
        let text = |key: &str, path: &Path| match json[key].as_str() {
            Some(text) => text.to_owned(),
            None => path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        };
        let suite = text("suite", dir.parent().unwrap_or(&dir));
        let name = text("case", &dir);
        Ok(Self {
            suite,
            name,
            dir,
            json,
        })
    }

    pub(crate) fn title(&self) -> String {
        format!("{}/{}", self.suite, self.name)
    }

    /// The value at a JSON pointer such as `/inputs/batch`, as a `T`.
    pub(crate) fn get<T: DeserializeOwned>(&self, pointer: &str) -> Result<T> {
        let value = self
            .json
            .pointer(pointer)
            .ok_or_else(|| anyhow!("no {pointer}"))?;
        serde_json::from_value(value.clone()).with_context(|| pointer.to_owned())
    }

    /// The tolerated relative L2 error.
    pub(crate) fn rel_l2(&self) -> Result<f64> {
        self.get("/tolerance/rel_l2")
    }

    /// The tensors of a file that `files` of `case.json` names, by default `KEY.safetensors`.
    pub(crate) fn tensors(&self, key: &str) -> Result<Tensors> {
        let default = format!("{key}.safetensors");
        let file = self.json["files"][key].as_str().unwrap_or(&default);
        Tensors::open(&self.dir.join(file))
    }

    /// The weights that `files.weights` names (by default `weights.safetensors`), later files over
    /// earlier ones.
    pub(crate) fn weights(&self) -> Result<WeightFiles> {
        let paths: Vec<PathBuf> = match &self.json["files"]["weights"] {
            Value::Array(names) => names
                .iter()
                .filter_map(Value::as_str)
                .map(|name| self.dir.join(name))
                .collect(),
            Value::String(name) => vec![self.dir.join(name)],
            _ => vec![self.dir.join("weights.safetensors")],
        };
        Ok(WeightFiles::open_all(&paths)?)
    }
}

fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// The tensors of a safetensors file of any type.
pub(crate) struct Tensors {
    path: PathBuf,
    arrays: BTreeMap<String, Array>,
    used: RefCell<BTreeSet<String>>,
}

/// A stored tensor.
pub(crate) struct Array {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Array {
    /// The elements, read as little-endian numbers of `N` bytes.
    pub(crate) fn read<const N: usize, T>(&self, from: fn([u8; N]) -> T) -> Vec<T> {
        let (chunks, _) = self.bytes.as_chunks::<N>();
        chunks.iter().map(|chunk| from(*chunk)).collect()
    }
}

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let arrays = file.iter().map(|(name, view)| {
            let array = Array {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            (name.to_owned(), array)
        });
        Ok(Self {
            path: path.to_owned(),
            arrays: arrays.collect(),
            used: RefCell::default(),
        })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.arrays.contains_key(name)
    }

    pub(crate) fn get(&self, name: &str) -> Result<&Array> {
        self.used.borrow_mut().insert(name.to_owned());
        let path = self.path.display();
        self.arrays
            .get(name)
            .ok_or_else(|| anyhow!("{path} has no tensor `{name}`"))
    }

    pub(crate) fn f32s(&self, name: &str) -> Result<Vec<f32>> {
        let array = self.get(name)?;
        if array.dtype != Dtype::F32 {
            bail!("`{name}` is {}, not F32", array.dtype);
        }
        Ok(array.read(f32::from_le_bytes))
    }

    pub(crate) fn i64s(&self, name: &str) -> Result<Vec<i64>> {
        let array = self.get(name)?;
        if array.dtype != Dtype::I64 {
            bail!("`{name}` is {}, not I64", array.dtype);
        }
        Ok(array.read(i64::from_le_bytes))
    }

    /// An `f32` tensor on the CPU.
    pub(crate) fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let shape = self.get(name)?.shape.clone();
        if shape.len() != D {
            bail!("`{name}` has shape {shape:?}, not {D} dimensions");
        }
        Ok(Tensor::from_data(
            TensorData::new(self.f32s(name)?, shape),
            &Device::flex(),
        ))
    }

    /// Compares a tensor by relative L2 error. If the file holds only the first part of the batch,
    /// that part is compared.
    pub(crate) fn close(
        &self,
        report: &mut Report,
        name: &str,
        found: &[f32],
        tolerance: f64,
    ) -> Result<()> {
        let expected = self.f32s(name)?;
        let first = self.get(name)?.shape.first() == Some(&1) && found.len() > expected.len();
        let part = if first && found.len().is_multiple_of(expected.len()) {
            &found[..expected.len()]
        } else {
            found
        };
        report.close(name, part, &expected, tolerance);
        Ok(())
    }

    /// Reports the tensors that nothing was compared with as failures.
    pub(crate) fn finish(&self, report: &mut Report) {
        let used = self.used.borrow();
        for name in self.names().filter(|name| !used.contains(*name)) {
            report.failure(name, "not compared".to_owned());
        }
    }
}

/// A tensor's elements.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .into_data()
        .try_into_vec::<f32>()
        .map_err(|error| anyhow!("{error:?}"))
}
