//! Matrices that are read by rows where they are.

use std::fmt;
use std::sync::Arc;

/// A matrix inside a weight file (or by formula), read by rows: a table of token embeddings, of which a
/// prompt needs a few rows and never the half gigabyte that it is.
#[derive(Clone)]
pub struct StoredTable {
    rows: usize,
    columns: usize,
    read: Arc<dyn Fn(usize) -> Vec<f32> + Send + Sync>,
}

impl fmt::Debug for StoredTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredTable")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

impl StoredTable {
    /// A table of this shape whose rows `read` gives.
    pub(crate) fn new(
        [rows, columns]: [usize; 2],
        read: impl Fn(usize) -> Vec<f32> + Send + Sync + 'static,
    ) -> Self {
        Self {
            rows,
            columns,
            read: Arc::new(read),
        }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Row `row` as `f32`, if there is one.
    pub fn read(&self, row: usize) -> Option<Vec<f32>> {
        (row < self.rows).then(|| (self.read)(row))
    }
}
