//! CPU micro-kernels per instruction set, chosen at run time. No Burn here; the only crate where `unsafe` may appear.
