//! Nitro-E in Rust: generate images, train, evaluate. The library facade and the `nitro` binary.
