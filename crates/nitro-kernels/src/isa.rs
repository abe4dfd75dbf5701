//! Which instruction set the kernels use, found once at run time, and the precision of products.

use std::sync::OnceLock;

/// An instruction set with its own micro-kernels, from most to least capable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F/BW/VL/DQ and BF16 (`vdpbf16ps`): Zen 4 and later, Sapphire Rapids and later.
    Avx512Bf16,
    /// x86-64 with AVX-512 F/BW/VL/DQ.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// 64-bit Arm with NEON.
    Neon,
    /// Plain Rust, for every machine.
    Portable,
}

impl Isa {
    /// The name used by the environment variable `NITRO_ISA` and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Whether this machine can run the kernels of this instruction set.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_supported()
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                    && std::arch::is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Isa::Avx512.is_supported() && std::arch::is_x86_feature_detected!("avx512bf16")
            }
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// All instruction sets this machine supports, best first. `Portable` is always the last.
    pub fn supported() -> Vec<Isa> {
        [
            Isa::Avx512Bf16,
            Isa::Avx512,
            Isa::Avx2,
            Isa::Neon,
            Isa::Portable,
        ]
        .into_iter()
        .filter(|isa| isa.is_supported())
        .collect()
    }

    /// The instruction set the kernels use unless a call names another.
    ///
    /// It is the best supported one. `NITRO_ISA=portable|avx2|avx512|avx512bf16|neon` forces one;
    /// a name that is unknown, or that this machine does not support, is answered with a warning on
    /// standard error and the best supported set that is not above the one asked for (for an unknown
    /// name, the best one).
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::choose(std::env::var("NITRO_ISA").ok().as_deref()))
    }

    fn choose(wanted: Option<&str>) -> Isa {
        let supported = Isa::supported();
        let best = supported[0];
        let Some(name) = wanted.map(str::trim).filter(|name| !name.is_empty()) else {
            return best;
        };
        // From most to least capable; falling back means walking down this list.
        let ladder = [
            Isa::Avx512Bf16,
            Isa::Avx512,
            Isa::Avx2,
            Isa::Neon,
            Isa::Portable,
        ];
        let Some(at) = ladder
            .iter()
            .position(|isa| isa.name().eq_ignore_ascii_case(name))
        else {
            eprintln!(
                "warning: NITRO_ISA={name} is unknown (portable, avx2, avx512, avx512bf16, neon); using {}",
                best.name()
            );
            return best;
        };
        let chosen = ladder[at..].iter().copied().find(|isa| isa.is_supported());
        let chosen = chosen.unwrap_or(Isa::Portable);
        if chosen != ladder[at] {
            eprintln!(
                "warning: NITRO_ISA={name} is not supported by this machine; using {}",
                chosen.name()
            );
        }
        chosen
    }

    /// This instruction set if the machine has it, otherwise [`Isa::Portable`].
    pub(crate) fn or_portable(self) -> Isa {
        if self.is_supported() {
            self
        } else {
            Isa::Portable
        }
    }
}

/// How products are computed. Sums are always in f32, and all data in memory are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Products of f32 values.
    #[default]
    F32,
    /// Inputs are rounded to bf16 (nearest, ties to even) while they are packed. With
    /// [`Isa::Avx512Bf16`] two products are computed per lane, at twice the f32 rate; every other
    /// instruction set multiplies the rounded values in f32, so results agree up to the order of sums.
    Bf16,
    /// Linear layers with packed weights multiply 8-bit integers: each output channel of a weight and
    /// each row of activations has its own scale. Every other product is computed as [`Self::Bf16`].
    Int8,
}

/// Compiles `$body::<FUSED>` for each instruction set under the name `$name(isa, ...)`, so that plain
/// loops take its vector width. `FUSED` says whether `mul_add` is one instruction. `$body` must be
/// `#[inline(always)]`, and `isa` one the machine supports.
macro_rules! multiversion {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident = $body:ident ($($arg:ident : $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        $visibility fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512($($arg: $ty),*) {
                $body::<true>($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body::<true>($($arg),*);
            }

            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx512Bf16 | $crate::isa::Isa::Avx512 => {
                    // SAFETY: callers pass an instruction set the machine supports.
                    unsafe { avx512($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => {
                    // SAFETY: as above.
                    unsafe { avx2($($arg),*) }
                }
                _ => $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
            }
        }
    };
}
pub(crate) use multiversion;

impl Precision {
    /// The name by which users know it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_set_is_used_and_a_bad_name_falls_back_to_the_best() {
        let best = Isa::supported()[0];
        assert_eq!(Isa::choose(None), best);
        assert_eq!(Isa::choose(Some("portable")), Isa::Portable);
        assert_eq!(Isa::choose(Some(" PORTABLE ")), Isa::Portable);
        assert_eq!(Isa::choose(Some("riscv-magic")), best);
        for isa in Isa::supported() {
            assert_eq!(Isa::choose(Some(isa.name())), isa);
        }
    }

    #[test]
    fn an_unsupported_set_falls_back_downwards() {
        for isa in [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Neon] {
            assert!(Isa::choose(Some(isa.name())).is_supported());
        }
        assert_eq!(Isa::supported().last(), Some(&Isa::Portable));
    }
}
