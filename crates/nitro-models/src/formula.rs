//! Full-size weights from a formula, for reference vectors whose weights would be gigabytes.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::random::{draw, fnv1a64};
use crate::{ParameterSource, ParameterSpec, StoredTable, WeightError};

/// Gives every parameter values that follow from its name and shape.
///
/// Element `i` of the stream `salt + name` is `u = draw >> 40` over `2^24`, and `s = 2 u - 1`.
/// `scale_shift_` tables are `0.3 s`; tensors of two or more dimensions `sqrt(3 / fan_in) s`; vectors
/// named `weight` are `1 + 0.1 s`, all other vectors `0.1 s`. Buffers keep their definition.
#[derive(Clone, Debug)]
pub struct FormulaWeights {
    salt: String,
}

impl FormulaWeights {
    /// The weights of this salt.
    pub fn new(salt: impl Into<String>) -> Self {
        Self { salt: salt.into() }
    }

    /// The first `count` uniform numbers `u` of the stream `name`, in `0..1`.
    pub fn uniform(&self, name: &str, count: usize) -> Vec<f32> {
        let stream = self.stream(name);
        let mut values = vec![0f32; count];
        values
            .par_chunks_mut(1 << 16)
            .enumerate()
            .for_each(|(chunk, values)| {
                for (i, value) in values.iter_mut().enumerate() {
                    *value = uniform(stream, (chunk << 16) + i);
                }
            });
        values
    }

    fn stream(&self, name: &str) -> u64 {
        fnv1a64(format!("{}{name}", self.salt).as_bytes())
    }
}

/// Number `i` of a stream.
fn uniform(stream: u64, i: usize) -> f32 {
    let bits = draw(stream, i as u64) >> 40;
    bits as f32 / (1u32 << 24) as f32
}

/// What is added to and multiplied with `2 u - 1`.
fn offset_and_factor(spec: &ParameterSpec) -> (f32, f32) {
    if spec.name.contains("scale_shift_") {
        (0.0, 0.3)
    } else if spec.shape.len() >= 2 {
        let fan_in: usize = spec.shape[1..].iter().product();
        (0.0, (3.0 / fan_in as f64).sqrt() as f32)
    } else if spec.name.ends_with("weight") {
        (1.0, 0.1)
    } else {
        (0.0, 0.1)
    }
}

impl ParameterSource for FormulaWeights {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let (offset, factor) = offset_and_factor(spec);
        let count = spec.numel();
        let mut values = self.uniform(&spec.name, count);
        values
            .par_iter_mut()
            .for_each(|u| *u = offset + factor * (2.0 * *u - 1.0));
        Ok(Tensor::from_data(TensorData::new(values, [count]), device))
    }

    fn contains(&self, _: &str) -> bool {
        false
    }

    fn verify(&self, _: &ParameterSpec) -> Result<(), WeightError> {
        Ok(())
    }

    fn table(&self, spec: &ParameterSpec) -> Result<Option<StoredTable>, WeightError> {
        let &[rows, columns] = spec.shape.as_slice() else {
            return Ok(None);
        };
        let (offset, factor) = offset_and_factor(spec);
        let stream = self.stream(&spec.name);
        Ok(Some(StoredTable::new([rows, columns], move |row| {
            let places = row * columns..(row + 1) * columns;
            let value = |i| offset + factor * (2.0 * uniform(stream, i) - 1.0);
            places.map(value).collect()
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Init;

    #[test]
    fn a_row_of_a_table_is_that_of_the_matrix() {
        let weights = FormulaWeights::new("salt/");
        let spec = ParameterSpec {
            name: "embed_tokens.weight".to_owned(),
            shape: vec![7, 5],
            init: Init::Zeros,
            trainable: true,
        };
        let table = weights.table(&spec).unwrap().unwrap();
        let whole = weights.parameter(&spec, &Device::flex()).unwrap();
        let whole = whole.into_data().try_into_vec::<f32>().unwrap();
        for (row, expected) in whole.chunks(5).enumerate() {
            assert_eq!(table.read(row).unwrap(), expected);
        }
        assert_eq!(table.read(7), None);
    }
}
