//! Schedules, samplers, guidance and torch-compatible noise: the mathematics of sampling over a denoiser given as a function.
