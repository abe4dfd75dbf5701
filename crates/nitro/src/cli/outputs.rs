//! Where pictures go. Files appear whole or not at all, and only a name the user gave is replaced.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::failure::bad_input;

/// Start of the names of pictures that the user did not name.
const DEFAULT_STEM: &str = "nitro";

/// Where a run's pictures go.
#[derive(Debug)]
pub(super) struct Outputs {
    folder: PathBuf,
    /// The stem the user gave.
    stem: Option<String>,
}

impl Outputs {
    /// `-o` as it was given: a file, a folder, or nothing (the current folder). Fails early where
    /// nothing can be written there.
    pub(super) fn plan(output: Option<&Path>) -> anyhow::Result<Self> {
        let (folder, stem) = match output {
            None => (PathBuf::from("."), None),
            Some(folder) if folder.is_dir() => (folder.to_owned(), None),
            Some(file) => {
                let png = file
                    .extension()
                    .is_some_and(|e| e.eq_ignore_ascii_case("png"));
                let stem = file
                    .file_stem()
                    .filter(|_| png)
                    .map(|s| s.to_string_lossy().into());
                if stem.is_none() {
                    return Err(bad_input(format!(
                        "output {}: give a file that ends in .png, or a folder that exists",
                        file.display()
                    )));
                }
                let folder = match file.parent() {
                    Some(parent) if parent != Path::new("") => parent.to_owned(),
                    _ => PathBuf::from("."),
                };
                (folder, stem)
            }
        };
        // Better now than after minutes of work.
        let probe = tempfile::Builder::new()
            .prefix(".nitro-")
            .tempfile_in(&folder);
        probe
            .with_context(|| format!("output folder {} cannot be written to", folder.display()))?;
        Ok(Self { folder, stem })
    }

    /// Paths for `count` pictures and, if wanted, their grid.
    pub(super) fn paths(
        &self,
        count: usize,
        grid: bool,
    ) -> anyhow::Result<(Vec<PathBuf>, Option<PathBuf>)> {
        let path = |name: String| self.folder.join(name);
        if let Some(stem) = &self.stem {
            let whole = path(format!("{stem}.png"));
            return Ok(match (count, grid) {
                (1, false) => (vec![whole], None),
                _ => {
                    let files = (1..=count)
                        .map(|i| path(format!("{stem}-{i}.png")))
                        .collect();
                    (files, grid.then_some(whole))
                }
            });
        }
        let first = self.first_free()?;
        let name = |i: usize| path(format!("{DEFAULT_STEM}-{:04}.png", first + i));
        let grid = grid.then(|| path(format!("{DEFAULT_STEM}-{first:04}-grid.png")));
        Ok(((0..count).map(name).collect(), grid))
    }

    /// One more than the largest number in use.
    fn first_free(&self) -> anyhow::Result<usize> {
        let entries = std::fs::read_dir(&self.folder)
            .with_context(|| format!("cannot list {}", self.folder.display()))?;
        let number = |name: &str| {
            let digits = name.strip_prefix(DEFAULT_STEM)?.strip_prefix('-')?;
            let end = digits
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(digits.len());
            digits[..end].parse::<usize>().ok()
        };
        let largest = entries
            .filter_map(|entry| number(&entry.ok()?.file_name().to_string_lossy()))
            .max();
        Ok(largest.map_or(1, |n| n.saturating_add(1)))
    }

    /// Writes `bytes` to `path`, which [`Outputs::paths`] gave.
    pub(super) fn write(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".nitro-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Pictures get the permissions of ordinary files, not of private temporary ones.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let attempt = || -> std::io::Result<()> {
            let mut file = builder.tempfile_in(&self.folder)?;
            file.write_all(bytes)?;
            match self.stem {
                Some(_) => file.persist(path)?,
                None => file.persist_noclobber(path)?,
            };
            Ok(())
        };
        attempt().with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(paths: &[PathBuf]) -> Vec<String> {
        paths
            .iter()
            .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_given_name_is_used_and_numbered_for_several() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("out.png");
        let outputs = Outputs::plan(Some(&file)).unwrap();
        assert_eq!(outputs.paths(1, false).unwrap(), (vec![file.clone()], None));
        let (files, grid) = outputs.paths(2, true).unwrap();
        assert_eq!(names(&files), ["out-1.png", "out-2.png"]);
        assert_eq!(grid, Some(file.clone()));
        // A second run under the same name replaces the picture.
        outputs.write(&file, b"one").unwrap();
        outputs.write(&file, b"two").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"two");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing else is left"
        );
    }

    #[test]
    fn default_names_never_replace_anything() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("nitro-0007.png"), b"old").unwrap();
        let outputs = Outputs::plan(Some(folder.path())).unwrap();
        let (files, grid) = outputs.paths(2, true).unwrap();
        assert_eq!(names(&files), ["nitro-0008.png", "nitro-0009.png"]);
        assert_eq!(names(&[grid.unwrap()]), ["nitro-0008-grid.png"]);
        outputs.write(&files[0], b"new").unwrap();
        assert!(outputs.write(&files[0], b"newer").is_err());
        assert_eq!(std::fs::read(&files[0]).unwrap(), b"new");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused_before_any_work() {
        let missing = Outputs::plan(Some(Path::new("/no/such/folder/out.png"))).unwrap_err();
        assert!(missing.to_string().contains("/no/such/folder"));
        let jpeg = Outputs::plan(Some(Path::new("out.jpg"))).unwrap_err();
        assert!(jpeg.to_string().contains(".png"));
    }
}
