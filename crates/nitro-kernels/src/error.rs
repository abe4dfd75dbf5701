//! The one error type of the GEMM and convolution kernels.

/// What was wrong with the arguments of a kernel. Kernels check every length before touching memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A slice holds fewer elements than the shape and strides given with it reach.
    #[error(
        "{what}: the shape needs {needed} elements but the slice holds {actual}; \
         pass the whole buffer, or correct the shape"
    )]
    TooShort {
        /// Which argument.
        what: &'static str,
        /// Elements the shape reaches.
        needed: usize,
        /// Elements in the slice.
        actual: usize,
    },
    /// Two sizes that must agree do not.
    #[error("{what}: expected {expected}, got {actual}")]
    Mismatch {
        /// Which sizes.
        what: &'static str,
        /// The size the other arguments imply.
        expected: usize,
        /// The size given.
        actual: usize,
    },
    /// A parameter outside what the kernel supports.
    #[error("{what}: {value} is not supported; {help}")]
    Unsupported {
        /// Which parameter.
        what: &'static str,
        /// The value given.
        value: usize,
        /// What is supported.
        help: &'static str,
    },
}

/// Checks that a slice of `actual` elements reaches at least `needed`.
pub(crate) fn check_len(
    what: &'static str,
    needed: usize,
    actual: usize,
) -> Result<(), KernelError> {
    if actual < needed {
        return Err(KernelError::TooShort {
            what,
            needed,
            actual,
        });
    }
    Ok(())
}

/// Checks that two sizes agree.
pub(crate) fn check_eq(
    what: &'static str,
    expected: usize,
    actual: usize,
) -> Result<(), KernelError> {
    if actual != expected {
        return Err(KernelError::Mismatch {
            what,
            expected,
            actual,
        });
    }
    Ok(())
}
