#!/usr/bin/env bash
# The kernels' tests for 64-bit ARM (NEON) on an x86 machine, under qemu's user-mode emulator: they compare every
# path with f64. Speed cannot be seen this way. Debian's packages: qemu-user gcc-aarch64-linux-gnu
# libc6-dev-arm64-cross. Arguments go to the test programs.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
command -v qemu-aarch64 aarch64-linux-gnu-gcc >/dev/null ||
    { echo "neon.sh: qemu-aarch64 or aarch64-linux-gnu-gcc is missing" >&2; exit 1; }
rustup target add "$target"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo test --release -p nitro-kernels --target "$target" --target-dir target/neon --lib --tests -- "$@"
