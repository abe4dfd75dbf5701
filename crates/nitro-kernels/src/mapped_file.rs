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

    /// Asks the system to read the file in the background: it will all be needed soon.
    pub fn will_need(&self) {
        #[cfg(unix)]
        // A hint: without it pages are read when they are touched.
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }

    /// The contents.
    pub fn as_bytes(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        map.will_need();
        assert_eq!(map.as_bytes(), b"first");
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
