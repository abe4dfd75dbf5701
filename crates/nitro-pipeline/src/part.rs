//! A part of a model that is loaded when it is first needed, and can be let go.

use std::sync::{Arc, Mutex, PoisonError};

use crate::PipelineError;

/// A text encoder or decoder, in memory or not. Pipelines of several variants share it.
#[derive(Debug)]
pub(crate) struct Part<T>(Mutex<Option<Arc<T>>>);

impl<T> Part<T> {
    /// Not loaded yet.
    pub(crate) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The part, by `load` if it is not in memory. Who asks meanwhile waits and gets the same.
    pub(crate) fn get(
        &self,
        load: impl FnOnce() -> Result<T, PipelineError>,
    ) -> Result<Arc<T>, PipelineError> {
        let mut part = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = &*part {
            return Ok(part.clone());
        }
        let loaded = Arc::new(load()?);
        *part = Some(loaded.clone());
        Ok(loaded)
    }

    /// Frees the memory as soon as nobody uses the part any more.
    pub(crate) fn release(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_part_is_loaded_once_until_it_is_released() {
        let loads = Cell::new(0);
        let part = Part::new();
        let load = || {
            loads.set(loads.get() + 1);
            Ok(loads.get())
        };
        assert_eq!((*part.get(load).unwrap(), *part.get(load).unwrap()), (1, 1));
        let held = part.get(load).unwrap();
        part.release();
        assert_eq!((*held, *part.get(load).unwrap()), (1, 2));
    }

    #[test]
    fn a_part_that_could_not_be_loaded_is_tried_again() {
        let part = Part::new();
        let fail = || {
            Err(PipelineError::Mismatch {
                reason: "no".to_owned(),
            })
        };
        part.get(fail).unwrap_err();
        assert_eq!(*part.get(|| Ok(3)).unwrap(), 3);
    }
}
