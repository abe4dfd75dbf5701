//! Weight files: memory-mapped safetensors under their official names, and writing them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use nitro_files::write_whole;
use nitro_kernels::mapped_file::MappedFile;
use nitro_ops::{ElementType, Rows};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::{Elements, ParameterSource, ParameterSpec, StoredTable, WeightError, torch_file};

/// Float formats of stored tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
}

/// Safetensors files, or checkpoints that `torch.save` wrote, opened together. Tensors of later files take the place of earlier ones of the
/// same name.
///
/// It remembers which tensors were asked for, so that [`finish`](Self::finish) can tell which had no
/// place in the model.
#[derive(Debug)]
pub struct WeightFiles {
    origin: String,
    files: Vec<Arc<Mapped>>,
    tensors: BTreeMap<String, Stored>,
    metadata: HashMap<String, String>,
    used: Mutex<BTreeSet<String>>,
    /// Bytes that were read so far, see [`WeightFiles::count_read`].
    read: AtomicUsize,
}

/// Bytes that are read of mapped files before the system is told that they are not needed any more.
const RELEASE_BYTES: usize = 128 << 20;

#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
struct Stored {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Of a tensor that does not lie in row-major order.
    strides: Option<Vec<usize>>,
    range: std::ops::Range<usize>,
}

impl WeightFiles {
    /// Opens one safetensors file, or a model folder: the files its `*.safetensors.index.json`
    /// names, else its `model.safetensors` or `diffusion_pytorch_model.safetensors`, else its only
    /// safetensors file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, WeightError> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::open_all(&[path]);
        }
        Self::read_files(&folder_files(path)?, path.display().to_string())
    }

    /// Opens several files; tensors of later ones take the place of earlier ones of the same name.
    pub fn open_all<P: AsRef<Path>>(paths: &[P]) -> Result<Self, WeightError> {
        let paths: Vec<PathBuf> = paths.iter().map(|path| path.as_ref().to_owned()).collect();
        let names: Vec<String> = paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Self::read_files(&paths, names.join(" + "))
    }

    fn read_files(paths: &[PathBuf], origin: String) -> Result<Self, WeightError> {
        let mut weights = Self::empty(origin);
        for path in paths {
            let file = MappedFile::open(path).map_err(|source| WeightError::Io {
                path: path.to_owned(),
                source,
            })?;
            weights.add(path, Bytes::Mapped(file))?;
        }
        Ok(weights)
    }

    /// Reads a safetensors file that is already in memory, such as one inside the program; `name`
    /// is what messages call it.
    pub fn from_bytes(
        name: &str,
        bytes: impl Into<Cow<'static, [u8]>>,
    ) -> Result<Self, WeightError> {
        let mut weights = Self::empty(name.to_owned());
        weights.add(Path::new(name), Bytes::Held(bytes.into()))?;
        Ok(weights)
    }

    fn empty(origin: String) -> Self {
        Self {
            origin,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
            used: Mutex::default(),
            read: AtomicUsize::new(0),
        }
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), WeightError> {
        if torch_file::is_torch(bytes.as_bytes()) {
            return self.add_torch(path, bytes);
        }
        if torch_file::is_old_torch(bytes.as_bytes()) {
            return Err(WeightError::CorruptTorch {
                path: path.to_owned(),
                reason:
                    "it has the format before PyTorch 1.6; load it there and torch.save it again"
                        .to_owned(),
            });
        }
        let (header, metadata) =
            SafeTensors::read_metadata(bytes.as_bytes()).map_err(|error| WeightError::Corrupt {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
        let data = header + 8; // after the header's length and the header
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let stored = Stored {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                strides: None,
                range: data + start..data + end,
            };
            self.tensors.insert(name, stored);
        }
        self.metadata
            .extend(metadata.metadata().clone().unwrap_or_default());
        self.files.push(Arc::new(Mapped {
            path: path.to_owned(),
            bytes,
        }));
        Ok(())
    }

    fn add_torch(&mut self, path: &Path, bytes: Bytes) -> Result<(), WeightError> {
        let located =
            torch_file::locate(bytes.as_bytes()).map_err(|reason| WeightError::CorruptTorch {
                path: path.to_owned(),
                reason,
            })?;
        for tensor in located {
            let stored = Stored {
                file: self.files.len(),
                dtype: tensor.dtype,
                shape: tensor.shape,
                strides: tensor.strides,
                range: tensor.range,
            };
            self.tensors.insert(tensor.name, stored);
        }
        self.files.push(Arc::new(Mapped {
            path: path.to_owned(),
            bytes,
        }));
        Ok(())
    }

    /// The files' paths, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The files' metadata; later files win.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// A tensor's shape, and its elements as `f32`.
    pub fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), WeightError> {
        let stored = self.find(name, &[])?;
        Ok((stored.shape.clone(), self.values(name, stored)?))
    }

    /// Fails if a tensor was never asked for whose name contains none of `ignored`: a checkpoint
    /// with tensors that the model has no place for is a checkpoint of another model.
    pub fn finish(&self, ignored: &[&str]) -> Result<(), WeightError> {
        let used = self
            .used
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let names: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| !used.contains(*name) && !ignored.iter().any(|part| name.contains(part)))
            .cloned()
            .collect();
        match names.is_empty() {
            true => Ok(()),
            false => Err(WeightError::Unexpected {
                origin: self.origin.clone(),
                names,
            }),
        }
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<&Stored, WeightError> {
        let stored = self.tensors.get(name).ok_or_else(|| WeightError::Missing {
            origin: self.origin.clone(),
            name: name.to_owned(),
            expected: expected.to_vec(),
        })?;
        let mut used = self
            .used
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        used.insert(name.to_owned());
        Ok(stored)
    }

    fn values(&self, name: &str, stored: &Stored) -> Result<Vec<f32>, WeightError> {
        let element = self.element_type(name, stored)?;
        let bytes = &self.files[stored.file].bytes.as_bytes()[stored.range.clone()];
        let elements: Vec<f32> = match element {
            ElementType::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            ElementType::F16 => bytes
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            ElementType::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
        };
        Ok(match &stored.strides {
            None => elements,
            Some(strides) => torch_file::in_order(&elements, &stored.shape, strides),
        })
    }
}

impl WeightFiles {
    /// The tensor that `spec` asks for, which must have its shape.
    fn find_like(&self, spec: &ParameterSpec) -> Result<&Stored, WeightError> {
        let stored = self.find(&spec.name, &spec.shape)?;
        if stored.shape != spec.shape {
            return Err(WeightError::Shape {
                origin: self.files[stored.file].path.display().to_string(),
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: stored.shape.clone(),
            });
        }
        Ok(stored)
    }

    /// Counts what is read of the files, and every now and then lets the system take the pages back: a
    /// model that packs its weights needs them once, and gigabytes of them would count as its memory.
    fn count_read(&self, stored: &Stored) {
        let before = self.read.fetch_add(stored.range.len(), Ordering::Relaxed);
        if (before + stored.range.len()) / RELEASE_BYTES > before / RELEASE_BYTES {
            for file in &self.files {
                if let Bytes::Mapped(map) = &file.bytes {
                    map.release();
                }
            }
        }
    }

    fn element_type(&self, name: &str, stored: &Stored) -> Result<ElementType, WeightError> {
        Ok(match stored.dtype {
            Dtype::F32 => ElementType::F32,
            Dtype::F16 => ElementType::F16,
            Dtype::BF16 => ElementType::Bf16,
            other => {
                return Err(WeightError::Dtype {
                    origin: self.files[stored.file].path.display().to_string(),
                    name: name.to_owned(),
                    found: other.to_string(),
                });
            }
        })
    }
}

impl Drop for WeightFiles {
    fn drop(&mut self) {
        // A table keeps its file mapped; the pages that were read for other tensors are not needed
        // any more.
        for file in &self.files {
            if let (true, Bytes::Mapped(map)) = (Arc::strong_count(file) > 1, &file.bytes) {
                map.release();
            }
        }
    }
}

impl ParameterSource for WeightFiles {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let stored = self.find_like(spec)?;
        let elements = self.values(&spec.name, stored)?;
        let count = elements.len();
        Ok(Tensor::from_data(
            TensorData::new(elements, [count]),
            device,
        ))
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn elements(&self, spec: &ParameterSpec) -> Result<Elements<'_>, WeightError> {
        let stored = self.find_like(spec)?;
        if stored.strides.is_some() {
            return Ok(Elements::Values(self.values(&spec.name, stored)?));
        }
        let element = self.element_type(&spec.name, stored)?;
        self.count_read(stored);
        let bytes = &self.files[stored.file].bytes.as_bytes()[stored.range.clone()];
        Ok(Elements::Stored(bytes, element))
    }

    fn verify(&self, spec: &ParameterSpec) -> Result<(), WeightError> {
        let stored = self.find_like(spec)?;
        self.element_type(&spec.name, stored).map(drop)
    }

    fn table(&self, spec: &ParameterSpec) -> Result<Option<StoredTable>, WeightError> {
        let stored = self.find_like(spec)?;
        let ([rows, columns], None) = (spec.shape.as_slice(), &stored.strides) else {
            return Ok(None);
        };
        let (rows, columns) = (*rows, *columns);
        let (file, range) = (self.files[stored.file].clone(), stored.range.clone());
        let element = self.element_type(&spec.name, stored)?;
        Ok(Some(StoredTable::new([rows, columns], move |row| {
            let bytes = &file.bytes.as_bytes()[range.clone()];
            let mut values = vec![0.0; columns];
            if let Ok(rows) = Rows::new(bytes, element, rows, columns) {
                rows.read(row, &mut values);
            }
            values
        })))
    }
}

/// Writes tensors `(name, shape, elements)` and `metadata` as a safetensors file.
///
/// The file is written aside and then renamed: readers see the old file or the new one, whole.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, Vec<usize>, &[f32])],
    metadata: &HashMap<String, String>,
    dtype: DType,
) -> Result<(), WeightError> {
    let path = path.as_ref();
    if let Some((name, shape, elements)) = tensors
        .iter()
        .find(|(_, shape, elements)| shape.iter().product::<usize>() != elements.len())
    {
        return Err(WeightError::Shape {
            origin: format!("writing {}", path.display()),
            name: name.clone(),
            expected: shape.clone(),
            found: vec![elements.len()],
        });
    }
    write_tensors(path, tensors, metadata, dtype).map_err(|source| WeightError::Io {
        path: path.to_owned(),
        source,
    })
}

fn write_tensors(
    path: &Path,
    tensors: &[(String, Vec<usize>, &[f32])],
    metadata: &HashMap<String, String>,
    dtype: DType,
) -> io::Result<()> {
    let (name, size) = match dtype {
        DType::F32 => ("F32", 4),
        DType::F16 => ("F16", 2),
        DType::BF16 => ("BF16", 2),
    };
    let mut header = Map::new();
    let sorted: BTreeMap<_, _> = metadata.iter().collect();
    header.insert("__metadata__".to_owned(), json!(sorted));
    let mut offset = 0;
    for (key, shape, elements) in tensors {
        let end = offset + elements.len() * size;
        let entry = json!({ "dtype": name, "shape": shape, "data_offsets": [offset, end] });
        header.insert(key.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // keeps the data aligned

    write_whole(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, _, elements) in tensors {
            for chunk in elements.chunks(1 << 14) {
                let bytes: Vec<u8> = match dtype {
                    DType::F32 => chunk.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    DType::F16 => chunk
                        .iter()
                        .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                        .collect(),
                    DType::BF16 => chunk
                        .iter()
                        .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                        .collect(),
                };
                out.write_all(&bytes)?;
            }
        }
        Ok(())
    })
}

/// The safetensors files of a model folder, in the order in which they are read.
fn folder_files(folder: &Path) -> Result<Vec<PathBuf>, WeightError> {
    let config = |reason: String| WeightError::Config {
        origin: folder.display().to_string(),
        reason,
    };
    let io = |path: &Path, source| WeightError::Io {
        path: path.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| io(folder, error))? {
        files.push(entry.map_err(|error| io(folder, error))?.path());
    }
    files.sort();
    let ending = |suffix: &str| -> Vec<PathBuf> {
        let ends = |path: &PathBuf| path.to_string_lossy().ends_with(suffix);
        files.iter().filter(|path| ends(path)).cloned().collect()
    };
    if let Some(index) = ending(".safetensors.index.json").first() {
        let text = std::fs::read_to_string(index).map_err(|error| io(index, error))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| WeightError::Corrupt {
            path: index.clone(),
            reason: format!("the index is not JSON: {error}"),
        })?;
        let map = value["weight_map"]
            .as_object()
            .ok_or_else(|| config(format!("{} has no `weight_map`", index.display())))?;
        let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    for name in ["model.safetensors", "diffusion_pytorch_model.safetensors"] {
        let path = folder.join(name);
        if files.contains(&path) {
            return Ok(vec![path]);
        }
    }
    match ending(".safetensors").as_slice() {
        [only] => Ok(vec![only.clone()]),
        [] => Err(config("holds no .safetensors file".to_owned())),
        several => Err(config(format!(
            "holds {} .safetensors files and no index; name the one to read",
            several.len()
        ))),
    }
}

/// A file's content.
#[derive(Debug)]
enum Bytes {
    Mapped(MappedFile),
    Held(Cow<'static, [u8]>),
}

impl Bytes {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file.as_bytes(),
            Self::Held(bytes) => bytes,
        }
    }
}
