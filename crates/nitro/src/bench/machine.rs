//! The machine and this program's memory, as the system tells them (Linux; elsewhere unknown).

use nitro_kernels::isa::Isa;
use nitro_kernels::pool::num_threads;
use serde::Serialize;

/// What the figures were measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name, if it is known.
    pub cpu: Option<String>,
    /// Cores the system offers this program.
    pub cores: usize,
    /// Threads that were used.
    pub threads: usize,
    /// The instruction set the kernels use.
    pub isa: &'static str,
    /// Memory in MiB, if it is known.
    pub memory_mib: Option<u64>,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// The machine this program runs on.
    pub fn this() -> Self {
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            threads: num_threads(),
            isa: Isa::current().name(),
            memory_mib: kib("/proc/meminfo", "MemTotal").map(|kib| kib / 1024),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// Memory that this program holds now, in MiB.
pub(super) fn resident_memory() -> Option<u64> {
    kib("/proc/self/status", "VmRSS").map(|kib| kib / 1024)
}

/// The most memory that this program held since [`reset_peak_memory`], in MiB.
pub(super) fn peak_memory() -> Option<u64> {
    kib("/proc/self/status", "VmHWM").map(|kib| kib / 1024)
}

/// Begins a new measurement of [`peak_memory`]. Where the system does not allow it, the peak stays
/// that of the whole program.
pub(super) fn reset_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The value of the line `key: value` of a file that the system makes.
fn field(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_owned())
    });
    value.filter(|value| !value.is_empty())
}

fn kib(file: &str, key: &str) -> Option<u64> {
    field(file, key)?.strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_follows_what_is_held() {
        reset_peak_memory();
        let before = peak_memory().unwrap();
        let held = std::hint::black_box(vec![1_u8; 64 << 20]);
        let with = peak_memory().unwrap();
        assert!(with >= before + 60, "{before} MiB, then {with} MiB");
        assert!(resident_memory().unwrap() >= 60);
        drop(held);
    }
}
