#!/usr/bin/env bash
# The kernels' tests under AddressSanitizer, once for each instruction set of this machine: reads and writes
# beyond buffers, use after free, and (with debug assertions) overflows and misaligned pointers of `unsafe` code.
#
#   scripts/sanitize.sh            # all of them
#   scripts/sanitize.sh avx2       # one
#
# The sanitizer comes with the stable toolchain; RUSTC_BOOTSTRAP lets the stable compiler take the flag. It has
# a target folder of its own, and the standard library is not instrumented. Tests themselves walk over all
# instruction sets; NITRO_ISA changes what calls without one take, which is what models do.
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p')
case "$host" in
x86_64-*-linux-gnu) known="avx512bf16 avx512 avx2 portable" ;;
aarch64-*-linux-gnu) known="neon portable" ;;
*) echo "no AddressSanitizer for $host" >&2; exit 1 ;;
esac

# The CPU flags that `Isa::is_supported` asks for.
has() {
    local flags="" flag
    case "$1" in
    avx2) flags="avx2 fma" ;;
    avx512) flags="avx512f avx512bw avx512vl avx512dq" ;;
    avx512bf16) flags="avx512f avx512bw avx512vl avx512dq avx512_bf16" ;;
    esac
    for flag in $flags; do
        grep -qw "$flag" /proc/cpuinfo || return 1
    done
}

export RUSTC_BOOTSTRAP=1
# nitro_sanitize: exact allocations, and scratch memory that begins as NaN (packed/memory.rs, pool.rs).
export RUSTFLAGS="-Zsanitizer=address -Cdebug-assertions=on --cfg nitro_sanitize"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/sanitize}"
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1:strict_init_order=1}"
for isa in ${1:-$known}; do
    if has "$isa"; then
        echo "== $isa"
        NITRO_ISA=$isa cargo test --release --target "$host" -p nitro-kernels --lib --tests
    else
        echo "== $isa: not on this machine"
    fi
done
