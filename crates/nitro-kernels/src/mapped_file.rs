//! Read-only memory maps, so that weights are loaded on first use and shared between processes.

use std::fs::File;
use std::io;
use std::path::Path;

/// A file mapped into memory for reading.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole file. The mapping outlives the open file handle.
    ///
    /// Files are replaced in this project by writing a new file and renaming it, which leaves an
    /// existing mapping intact; a file must not be truncated or rewritten in place while mapped.
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this value. The remaining hazard, another
        // process changing the file in place, is excluded by the contract above; model and data
        // files are immutable once written.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map })
    }

    /// Lets the system take back the pages that were read; they are read again when used again.
    pub fn release(&self) {
        #[cfg(unix)]
        // SAFETY: of a read-only map of a file this discards nothing: the next access finds the
        // file's contents again.
        let _ = unsafe {
            self.map
                .unchecked_advise(memmap2::UncheckedAdvice::DontNeed)
        };
    }

    /// Asks for huge pages: of a file that will all be read again and again.
    pub fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        // A hint: some file systems have none.
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    /// Whether most of the mapping, of which every part must have been touched, lies on huge pages.
    /// `None` where the system does not tell.
    pub fn is_on_huge_pages(&self) -> Option<bool> {
        #[cfg(target_os = "linux")]
        {
            let mappings = std::fs::read_to_string("/proc/self/smaps").ok()?;
            let huge = huge_bytes(&mappings, self.map.as_ptr() as usize)?;
            Some(huge * 2 > self.map.len())
        }
        #[cfg(not(target_os = "linux"))]
        None
    }

    /// The contents.
    pub fn as_bytes(&self) -> &[u8] {
        &self.map
    }
}

/// The bytes on huge pages of the mapping of a file that begins at `start`, by Linux' list of mappings.
#[cfg(target_os = "linux")]
fn huge_bytes(mappings: &str, start: usize) -> Option<usize> {
    let head = format!("{start:08x}-");
    let mut lines = mappings.lines().skip_while(|line| !line.starts_with(&head));
    let huge = lines.find_map(|line| line.strip_prefix("FilePmdMapped:"))?;
    let kib: usize = huge.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn huge_pages_of_a_mapping_are_found() {
        let list = "7f0000000000-7f0000200000 r--p 00000000 fe:00 1 /a\n\
                    Rss: 2048 kB\nFilePmdMapped:        0 kB\nVmFlags: rd mr\n\
                    7f0000200000-7f0000a00000 r--s 00000000 fe:00 2 /b c\n\
                    Rss: 8192 kB\nFilePmdMapped:     6144 kB\nVmFlags: rd mr\n";
        assert_eq!(huge_bytes(list, 0x7f00_0000_0000), Some(0));
        assert_eq!(huge_bytes(list, 0x7f00_0020_0000), Some(6 << 20));
        assert_eq!(huge_bytes(list, 0x7f00_0010_0000), None);
        assert_eq!(huge_bytes("", 0), None);
    }

    #[test]
    fn the_contents_are_those_of_the_file_even_after_it_is_replaced() {
        let dir = std::env::temp_dir().join(format!("nitro-mapped-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("weights");
        std::fs::write(&path, b"first").unwrap();
        let map = MappedFile::open(&path).unwrap();
        let other = dir.join("new");
        std::fs::write(&other, b"second version").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(map.as_bytes(), b"first");
        map.release();
        map.prefer_huge_pages();
        assert_eq!(map.as_bytes(), b"first");
        // One page is no huge one.
        assert_ne!(map.is_on_huge_pages(), Some(true));
        assert_eq!(
            MappedFile::open(&path).unwrap().as_bytes(),
            b"second version"
        );
        std::fs::write(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().as_bytes(), b"");
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            MappedFile::open(&path).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
