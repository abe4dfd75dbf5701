//! Files that appear whole or not at all.
//!
//! Everything that nitro writes and someone may read while it is being written, or after the program
//! was killed, goes through here: pictures, weights, checkpoints, shards, results.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a file is written through.
pub type Writer = BufWriter<File>;

/// Writes a file through `write`: to a new file beside it, which takes its name when all of it is on
/// the disk. The folder must exist: a mistyped path is an error, not a new folder.
///
/// A reader sees the old file or the new one, never a part; a failure leaves an older file as it was
/// and nothing beside it. A killed process may leave `.NAME.PID-N.part`, which nothing reads.
///
/// # Errors
/// What `write` returns, and what the file system says, as `E`.
pub fn write_whole<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut Writer) -> Result<(), E>,
) -> Result<(), E> {
    write_beside(path, true, write)
}

/// As [`write_whole`], without waiting for the disk: for large files that can be made again. If the
/// machine loses power soon after, the file may have its name and length but not all of its contents,
/// which its readers must notice.
///
/// # Errors
/// As [`write_whole`].
pub fn write_whole_unsynced<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut Writer) -> Result<(), E>,
) -> Result<(), E> {
    write_beside(path, false, write)
}

fn write_beside<E: From<io::Error>>(
    path: &Path,
    sync: bool,
    write: impl FnOnce(&mut Writer) -> Result<(), E>,
) -> Result<(), E> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(io::Error::from(ErrorKind::InvalidInput).into());
    };
    let mut beside = OsString::from(".");
    beside.push(name);
    // Two threads that write the same file do not meet.
    let unique = COUNT.fetch_add(1, Ordering::Relaxed);
    beside.push(format!(".{}-{unique}.part", std::process::id()));
    let beside = path.with_file_name(beside);

    let written = (|| {
        let mut writer = BufWriter::with_capacity(1 << 20, File::create_new(&beside)?);
        write(&mut writer)?;
        let file = writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        if sync {
            // A rename may reach the disk before the data it names.
            file.sync_all()?;
        }
        Ok(fs::rename(&beside, path)?)
    })();
    if written.is_err() {
        // Nothing to tell if this fails too: the first error is the cause.
        let _ = fs::remove_file(&beside);
    }
    written
}

/// Writes `bytes` as a file, as [`write_whole`] does.
///
/// # Errors
/// What the file system says.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, |writer| writer.write_all(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.bin");
        write_bytes(&path, b"old").unwrap();
        write_bytes(&path, b"newer").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newer");
        write_whole_unsynced(&path, |writer| writer.write_all(b"newest")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newest");
        assert_eq!(names(folder.path()), ["weights.bin"]);
    }

    #[test]
    fn a_failure_midway_keeps_the_older_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        write_bytes(&path, b"old").unwrap();
        let failed = write_whole::<io::Error>(&path, |writer| {
            writer.write_all(b"half")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["results.json"]);
    }

    #[test]
    fn no_folder_and_no_name_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write_bytes(&folder.path().join("missing/file"), b"").is_err());
        assert!(write_bytes(Path::new("/"), b"").is_err());
    }
}
