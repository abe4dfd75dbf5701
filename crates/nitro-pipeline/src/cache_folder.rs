//! Folders of files that are kept to be faster next time, and can be made again: where they are, and how
//! they stay within bounds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::{packed_cache, prompt_cache};

/// Files that a killed program left half written are removed after this time.
const LEFT_OVER: Duration = Duration::from_secs(3600);

/// What is kept in a folder.
#[derive(Debug)]
pub(crate) struct Kind {
    /// In words.
    pub(crate) holds: &'static str,
    /// The environment variable that names another folder, or `off`.
    pub(crate) variable: &'static str,
    /// The folder's name in nitro's own.
    pub(crate) name: &'static str,
    /// Bytes of all files.
    pub(crate) limit: u64,
    /// Whether a file of this name is one of them: a user may have named a folder with other files,
    /// which must stay.
    pub(crate) owns: fn(&str) -> bool,
}

/// One of nitro's cache folders.
#[derive(Clone, Debug)]
pub struct CacheFolder {
    kind: &'static Kind,
    path: Option<PathBuf>,
}

/// All of them, as the environment says.
pub fn caches() -> [CacheFolder; 2] {
    [&prompt_cache::KIND, &packed_cache::KIND].map(|kind| CacheFolder {
        kind,
        path: kind.folder(),
    })
}

impl CacheFolder {
    /// What it holds.
    pub fn holds(&self) -> &'static str {
        self.kind.holds
    }

    /// The environment variable that names another folder, or `off`.
    pub fn variable(&self) -> &'static str {
        self.kind.variable
    }

    /// Where it is; `None` if it is switched off.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Bytes that it holds at most: the files that were not used for longest are removed first.
    pub fn limit(&self) -> u64 {
        self.kind.limit
    }

    /// Its files with their bytes, the one that was not used for longest first. None if there is no
    /// folder.
    ///
    /// # Errors
    /// What the file system says.
    pub fn files(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let Some(folder) = &self.path else {
            return Ok(Vec::new());
        };
        match self.kind.files(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            found => Ok(found?.into_iter().map(|f| (f.path, f.length)).collect()),
        }
    }

    /// Removes its files. Programs that have one mapped keep what they have.
    ///
    /// # Errors
    /// What the file system says.
    pub fn clear(&self) -> io::Result<()> {
        for (path, _) in self.files()? {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// A file; by age.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kept {
    used: SystemTime,
    length: u64,
    path: PathBuf,
    /// Whether someone is writing it, or was killed while writing it (see `nitro_files`).
    part: bool,
}

impl Kind {
    /// The folder that the variable names, else the one in the user's cache folder; `None` if the
    /// variable is empty or `off`, or nobody knows where caches belong.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        let value = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        match std::env::var_os(self.variable) {
            Some(folder) if folder.is_empty() || folder == "off" => None,
            Some(folder) => Some(folder.into()),
            None => value("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| value("HOME").map(|home| Path::new(&home).join(".cache")))
                .map(|cache| cache.join("nitro").join(self.name)),
        }
    }

    /// Removes the files that were not used for longest until the others have at most `limit` bytes,
    /// and what killed programs left behind.
    pub(crate) fn prune(&self, folder: &Path, limit: u64) -> io::Result<()> {
        let (parts, files): (Vec<Kept>, Vec<Kept>) =
            self.files(folder)?.into_iter().partition(|file| file.part);
        for file in parts {
            if file.used.elapsed().is_ok_and(|age| age > LEFT_OVER) {
                fs::remove_file(file.path)?;
            }
        }
        let mut total: u64 = files.iter().map(|file| file.length).sum();
        for file in files {
            if total <= limit {
                break;
            }
            fs::remove_file(file.path)?;
            total -= file.length;
        }
        Ok(())
    }

    fn files(&self, folder: &Path) -> io::Result<Vec<Kept>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(part) = name.to_str().and_then(|name| self.part(name)) else {
                continue;
            };
            // Another program may have removed it meanwhile.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_file() {
                files.push(Kept {
                    used: metadata.modified()?,
                    length: metadata.len(),
                    path: entry.path(),
                    part,
                });
            }
        }
        files.sort();
        Ok(files)
    }

    /// Whether a file of this name is one that is being written; `None` if it is not one of these
    /// files at all.
    fn part(&self, name: &str) -> Option<bool> {
        let hidden = name.strip_prefix('.').and_then(|n| n.strip_suffix(".part"));
        let (name, part) = match hidden.and_then(|name| name.rsplit_once('.')) {
            Some((name, _process)) => (name, true),
            None => (name, false),
        };
        (self.owns)(name).then_some(part)
    }
}

/// Marks a file as used now, if that can be done.
pub(crate) fn touch(path: &Path) {
    let file = fs::File::options().append(true).open(path);
    let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
}

/// Whether `text` is `digits` hexadecimal digits as the caches write them.
pub(crate) fn is_hash(text: &str, digits: usize) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == digits && text.bytes().all(digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    static KIND: Kind = Kind {
        holds: "tests",
        variable: "",
        name: "",
        limit: 100,
        owns: |name| {
            name.strip_prefix("own-")
                .is_some_and(|hash| is_hash(hash, 2))
        },
    };

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn file(path: PathBuf, bytes: usize, age: u64) {
        fs::write(&path, vec![0; bytes]).unwrap();
        let file = fs::File::options().append(true).open(&path).unwrap();
        let time = SystemTime::now() - Duration::from_secs(age);
        file.set_modified(time).unwrap();
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_other_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let long = 2 * LEFT_OVER.as_secs();
        file(path("own-01"), 40, 300);
        file(path("own-02"), 40, 500);
        file(path("own-03"), 40, 10);
        file(path(".own-04.1-0.part"), 1000, 5);
        file(path(".own-05.1-0.part"), 1, long);
        let foreign = [".other.1-0.part", "model.safetensors", "own-1", "own-xy"];
        for name in foreign {
            file(path(name), 1000, long);
        }
        touch(&path("own-02"));
        KIND.prune(folder.path(), 100).unwrap();
        let mut left = vec![".own-04.1-0.part", "own-02", "own-03"];
        left.extend(foreign);
        left.sort();
        assert_eq!(names(folder.path()), left);

        let cache = CacheFolder {
            kind: &KIND,
            path: Some(folder.path().to_owned()),
        };
        assert_eq!(cache.files().unwrap().len(), 3);
        cache.clear().unwrap();
        assert_eq!(cache.files().unwrap(), []);
        assert_eq!(names(folder.path()), foreign);
        drop(folder);
        assert_eq!(cache.files().unwrap(), []);
    }
}
