//! Where a model's files are: inside the program, in a folder, or on the Hub.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use crate::PipelineError;
use crate::card::{CARD_FILE, ModelCard};
use crate::hub::{Hub, HubError, HubOptions};

/// The Hub name of the official weights.
pub const OFFICIAL_REPOSITORY: &str = "amd/Nitro-E";

/// The files of a model that is compiled into the program.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedModel {
    /// Name in messages.
    pub name: &'static str,
    /// Path in the model folder, and content.
    pub files: &'static [(&'static str, &'static [u8])],
}

/// Where to find a model.
#[derive(Clone, Debug)]
pub enum ModelLocation {
    /// Compiled into the program.
    Embedded(EmbeddedModel),
    /// A local folder, with a `nitro.json` or in the official layout.
    Folder(PathBuf),
    /// A repository of the Hugging Face Hub, `org/name`.
    Hub(String),
}

impl From<&str> for ModelLocation {
    /// A folder that exists is that folder; otherwise `org/name` is a Hub repository, and everything
    /// else a folder (whose absence is reported when it is opened).
    fn from(text: &str) -> Self {
        let word = |w: &str| {
            !w.is_empty()
                && !w.starts_with('.')
                && w.chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        match text.split_once('/') {
            Some((org, name)) if word(org) && word(name) && !Path::new(text).exists() => {
                Self::Hub(text.to_owned())
            }
            _ => Self::Folder(PathBuf::from(text)),
        }
    }
}

impl From<EmbeddedModel> for ModelLocation {
    fn from(model: EmbeddedModel) -> Self {
        Self::Embedded(model)
    }
}

impl From<&Path> for ModelLocation {
    fn from(folder: &Path) -> Self {
        Self::Folder(folder.to_owned())
    }
}

impl From<PathBuf> for ModelLocation {
    fn from(folder: PathBuf) -> Self {
        Self::Folder(folder)
    }
}

/// One file of a model.
#[derive(Clone, Debug)]
pub enum ModelFile {
    /// On disk.
    Disk(PathBuf),
    /// In the program.
    Embedded {
        /// Name in messages.
        name: String,
        /// Content.
        bytes: &'static [u8],
    },
}

impl ModelFile {
    /// How messages call the file.
    pub fn name(&self) -> String {
        match self {
            Self::Disk(path) => path.display().to_string(),
            Self::Embedded { name, .. } => name.clone(),
        }
    }

    /// The whole content; meant for small files.
    pub fn read(&self) -> Result<Cow<'static, [u8]>, PipelineError> {
        match self {
            Self::Disk(path) => {
                std::fs::read(path)
                    .map(Cow::Owned)
                    .map_err(|source| PipelineError::Read {
                        path: path.clone(),
                        source,
                    })
            }
            Self::Embedded { bytes, .. } => Ok(Cow::Borrowed(bytes)),
        }
    }

    /// The content's SHA-256 in hexadecimal.
    pub fn sha256(&self) -> Result<String, PipelineError> {
        let mut sha256 = Sha256::new();
        self.hash_into(&mut sha256)?;
        Ok(hex(&sha256.finalize()))
    }

    /// Feeds the content to `sha256` in pieces.
    pub(crate) fn hash_into(&self, sha256: &mut Sha256) -> Result<(), PipelineError> {
        match self {
            Self::Disk(path) => std::fs::File::open(path)
                .and_then(|mut file| std::io::copy(&mut file, sha256))
                .map(|_| ())
                .map_err(|source| PipelineError::Read {
                    path: path.clone(),
                    source,
                }),
            Self::Embedded { bytes, .. } => {
                sha256.update(bytes);
                Ok(())
            }
        }
    }
}

/// A model's card and the way to its files.
#[derive(Debug)]
pub struct ModelFiles {
    source: Source,
    card: ModelCard,
}

impl ModelFiles {
    /// Finds the model and reads its card; of a Hub repository nothing else is downloaded yet.
    pub fn open(
        location: impl Into<ModelLocation>,
        options: HubOptions,
    ) -> Result<Self, PipelineError> {
        let files = Self::open_parts(location, options)?;
        if files.card.variants.is_empty() {
            return Err(files.source.no_model());
        }
        Ok(files)
    }

    /// The same for a model whose transformer is not needed, or not there yet: one of the folders
    /// `dc-ae` and `text_encoder` is enough.
    pub fn open_parts(
        location: impl Into<ModelLocation>,
        options: HubOptions,
    ) -> Result<Self, PipelineError> {
        let source = Source {
            location: location.into(),
            options,
            hub: OnceLock::new(),
        };
        let card = source.card()?;
        let own = |part: &str| !part.starts_with("hf:");
        if card.variants.is_empty() && !own(&card.dc_ae) && !own(&card.text_encoder) {
            return Err(source.no_model());
        }
        Ok(Self { source, card })
    }

    /// What the model is made of.
    pub fn card(&self) -> &ModelCard {
        &self.card
    }

    /// The file `path` of the model folder.
    pub fn file(&self, path: &str) -> Result<ModelFile, PipelineError> {
        self.source.file(path)
    }

    /// The file `name` of a part that the card places at `part`: a folder, or `hf:org/name`.
    pub fn part_file(&self, part: &str, name: &str) -> Result<ModelFile, PipelineError> {
        match part.strip_prefix("hf:") {
            Some(repo) => self.source.hub_file(repo, name),
            None => self.source.file(&format!("{part}/{name}")),
        }
    }

    /// How messages call the model's place.
    pub fn place(&self) -> String {
        self.source.place()
    }
}

#[derive(Debug)]
struct Source {
    location: ModelLocation,
    options: HubOptions,
    hub: OnceLock<Hub>,
}

impl Source {
    fn place(&self) -> String {
        match &self.location {
            ModelLocation::Embedded(model) => model.name.to_owned(),
            ModelLocation::Folder(folder) => folder.display().to_string(),
            ModelLocation::Hub(repo) => repo.clone(),
        }
    }

    fn no_model(&self) -> PipelineError {
        PipelineError::NoModel {
            place: self.place(),
            reason: format!(
                "it holds neither {CARD_FILE} nor transformers under their official names (such as \
                 {})",
                ModelCard::official("", |_| true).variants[0].transformer
            ),
        }
    }

    fn card(&self) -> Result<ModelCard, PipelineError> {
        // The official repository keeps the other parts in repositories of their own.
        let official = || {
            ModelCard::official(&self.place(), |path| {
                !["dc-ae", "text_encoder"].contains(&path)
            })
        };
        match &self.location {
            ModelLocation::Hub(repo) if repo == OFFICIAL_REPOSITORY => Ok(official()),
            ModelLocation::Hub(repo) => match self.hub_file(repo, CARD_FILE) {
                Ok(file) => ModelCard::parse(&file.read()?, &file.name()),
                // Fine-tunes keep the official file names and bring no card.
                Err(PipelineError::Hub(HubError::NotFound { .. })) => Ok(official()),
                Err(e) => Err(e),
            },
            ModelLocation::Folder(folder) if !folder.is_dir() => Err(PipelineError::NoModel {
                place: self.place(),
                reason: "there is no such folder (a Hub model is written org/name)".to_owned(),
            }),
            ModelLocation::Folder(folder) if !folder.join(CARD_FILE).exists() => {
                Ok(ModelCard::official(&self.place(), |path| {
                    folder.join(path).exists()
                }))
            }
            ModelLocation::Folder(_) | ModelLocation::Embedded(_) => {
                let file = self.file(CARD_FILE)?;
                ModelCard::parse(&file.read()?, &file.name())
            }
        }
    }

    fn file(&self, path: &str) -> Result<ModelFile, PipelineError> {
        match &self.location {
            ModelLocation::Embedded(model) => {
                let bytes = embedded(model, path).ok_or_else(|| PipelineError::NoModel {
                    place: self.place(),
                    reason: format!("it has no {path}"),
                })?;
                Ok(ModelFile::Embedded {
                    name: format!("{}/{path}", model.name),
                    bytes,
                })
            }
            ModelLocation::Folder(folder) => {
                let path = folder.join(path);
                match path.metadata() {
                    Ok(_) => Ok(ModelFile::Disk(path)),
                    Err(source) => Err(PipelineError::Read { path, source }),
                }
            }
            ModelLocation::Hub(repo) => self.hub_file(repo, path),
        }
    }

    fn hub_file(&self, repo: &str, path: &str) -> Result<ModelFile, PipelineError> {
        // Connected on first use: a local model never touches the Hub's cache.
        let hub = match self.hub.get() {
            Some(hub) => hub,
            None => {
                let hub = Hub::new(self.options.clone())?;
                self.hub.get_or_init(|| hub)
            }
        };
        Ok(ModelFile::Disk(hub.file(repo, path)?))
    }
}

fn embedded(model: &EmbeddedModel, path: &str) -> Option<&'static [u8]> {
    model
        .files
        .iter()
        .find(|(name, _)| *name == path)
        .map(|(_, bytes)| *bytes)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_folders() {
        let is_hub = |text: &str| matches!(ModelLocation::from(text), ModelLocation::Hub(_));
        assert!(is_hub("amd/Nitro-E"));
        assert!(is_hub("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"));
        for folder in [
            "models",
            "./amd/Nitro-E",
            "/models/x",
            "a/b/c",
            "../x",
            "a/",
            "src/card.rs",
        ] {
            assert!(!is_hub(folder), "{folder}");
        }
    }

    #[test]
    fn an_absent_or_empty_folder_is_explained() {
        let open = |path: &Path| ModelFiles::open(path, HubOptions::from_env()).unwrap_err();
        let error = open(Path::new("/no/such/model")).to_string();
        assert!(
            error.contains("/no/such/model") && error.contains("no such folder"),
            "{error}"
        );
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path()).to_string();
        assert!(
            error.contains("nitro.json") && error.contains("Nitro-E-512px"),
            "{error}"
        );
    }
}
