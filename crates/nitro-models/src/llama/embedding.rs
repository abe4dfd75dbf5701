//! Token embeddings, and the language-model head that is often tied to them.

use burn::tensor::module::embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};
use nitro_ops::{Precision, linear};

use crate::{Init, InputError, Params, StoredTable, WeightError};

/// Vocabulary rows of a stored head that are multiplied at once.
const HEAD_ROWS: usize = 8192;

/// A `[vocabulary, hidden]` matrix.
#[derive(Clone, Debug)]
pub(super) enum TokenTable {
    /// In memory.
    Tensor(Tensor<2>),
    /// In the file it came from: a prompt needs a few of its rows.
    Stored(StoredTable, Device),
}

impl TokenTable {
    /// The parameter `weight` at `p`.
    pub(super) fn new(p: &Params<'_>, rows: usize, hidden: usize) -> Result<Self, WeightError> {
        let shape = [rows, hidden];
        if p.packs()
            && let Some(table) = p.table("weight", shape)?
        {
            return Ok(Self::Stored(table, p.device().clone()));
        }
        Ok(Self::Tensor(p.tensor(
            "weight",
            shape,
            Init::Normal(0.02),
        )?))
    }

    /// The rows of `ids [b, t]`: `[b, t, hidden]`.
    pub(super) fn rows(&self, ids: Tensor<2, Int>) -> Result<Tensor<3>, InputError> {
        let (table, device) = match self {
            Self::Tensor(table) => return Ok(embedding(table.clone(), ids)),
            Self::Stored(table, device) => (table, device),
        };
        let [b, t] = ids.dims();
        let mut values = Vec::with_capacity(b * t * table.columns());
        for id in ids.into_data().iter::<i64>() {
            let row = usize::try_from(id).ok().and_then(|id| table.read(id));
            values.extend(row.ok_or_else(|| InputError {
                model: "Llama",
                reason: format!("token {id} is not in the vocabulary of {}", table.rows()),
            })?);
        }
        let data = TensorData::new(values, [b, t, table.columns()]);
        Ok(Tensor::from_data(data, device))
    }

    /// `hidden [b, t, hidden]` times all rows: `[b, t, vocabulary]`.
    pub(super) fn logits(&self, hidden: Tensor<3>, precision: Precision) -> Tensor<3> {
        let product =
            |x: Tensor<3>, rows: &Tensor<2>| linear(x, rows, None, Default::default(), precision);
        let (table, device) = match self {
            Self::Tensor(table) => return product(hidden, table),
            Self::Stored(table, device) => (table, device),
        };
        let parts = (0..table.rows()).step_by(HEAD_ROWS).map(|first| {
            let rows = first..(first + HEAD_ROWS).min(table.rows());
            let count = rows.len();
            let values: Vec<f32> = rows.filter_map(|row| table.read(row)).flatten().collect();
            let data = TensorData::new(values, [count, table.columns()]);
            product(hidden.clone(), &Tensor::from_data(data, device))
        });
        Tensor::cat(parts.collect(), 2)
    }
}
