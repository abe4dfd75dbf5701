//! Files from the Hugging Face Hub, through `hf-hub` and the cache all Hub clients share.
//!
//! `hf-hub` speaks the protocol and keeps the cache; around it stand the token and cache variables of
//! the environment, offline mode, a download that ended after its last byte, and errors that say
//! what to do.

use std::path::PathBuf;
use std::sync::Arc;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo};

/// Where the Hub lives unless `HF_ENDPOINT` names a mirror.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How often a broken transfer is taken up again before giving up.
const RETRIES: usize = 4;

/// The Hub did not give a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Offline mode, and the cache does not hold the file.
    #[error(
        "{repo}/{file} is not in the cache {cache} and offline mode is on; \
         run once with network and without --offline / HF_HUB_OFFLINE, or give a local folder"
    )]
    Offline {
        /// `org/name`.
        repo: String,
        /// Path in the repository.
        file: String,
        /// Cache folder that was looked in.
        cache: PathBuf,
    },
    /// The repository wants to know who asks, or does not let them in.
    #[error(
        "access to {repo} was refused (HTTP {status}): it is gated, private or does not exist. \
         1. Open {endpoint}/{repo}, sign in and accept its terms; \
         2. create a read token at {endpoint}/settings/tokens; \
         3. run again with HF_TOKEN=<token> ({token_state})"
    )]
    Refused {
        /// `org/name`.
        repo: String,
        /// Base address of the Hub.
        endpoint: String,
        /// HTTP status, 401 or 403.
        status: u16,
        /// Whether a token was sent.
        token_state: &'static str,
    },
    /// The repository has no such file.
    #[error("{repo} has no file {file} at {endpoint}")]
    NotFound {
        /// `org/name`.
        repo: String,
        /// Path in the repository.
        file: String,
        /// Base address of the Hub.
        endpoint: String,
    },
    /// The Hub could not be reached, or the transfer broke for good.
    #[error(
        "cannot download {repo}/{file} from {endpoint}: {reason}; check the network (what has \
         arrived is kept and resumed), or use --offline or a local folder"
    )]
    Transfer {
        /// `org/name`.
        repo: String,
        /// Path in the repository.
        file: String,
        /// Base address of the Hub.
        endpoint: String,
        /// What the network said.
        reason: String,
    },
    /// The cache folder cannot be used.
    #[error("the Hub cache {cache} cannot be used: {reason}; set HF_HOME to a writable folder")]
    Cache {
        /// Cache folder.
        cache: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Hears how a download goes.
pub trait DownloadProgress: Send + Sync {
    /// `file` of `repo` begins; `bytes` is its size.
    fn start(&self, repo: &str, file: &str, bytes: u64);
    /// `bytes` more are here (the first call counts what an earlier run had left).
    fn advance(&self, bytes: u64);
    /// The file is complete.
    fn finish(&self);
}

/// How the Hub is spoken to.
#[derive(Clone)]
pub struct HubOptions {
    /// Base address without a trailing slash.
    pub endpoint: String,
    /// Cache folder (`models--org--name/...` inside).
    pub cache: PathBuf,
    /// Access token.
    pub token: Option<String>,
    /// Take everything from the cache and never use the network.
    pub offline: bool,
    /// Who hears about downloads.
    pub progress: Option<Arc<dyn DownloadProgress>>,
}

impl std::fmt::Debug for HubOptions {
    // The token is a secret and stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl HubOptions {
    /// What the environment asks for, by the variables of `huggingface_hub`: `HF_HOME`,
    /// `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` (else the file that `hf auth login` writes) and
    /// `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
        // `Cache::default` panics where there is no home directory, so ask for it last.
        let cache = match (set("HF_HUB_CACHE"), set("HF_HOME"), std::env::home_dir()) {
            (Some(cache), _, _) => PathBuf::from(cache),
            (None, Some(home), _) => PathBuf::from(home).join("hub"),
            (None, None, Some(home)) => home.join(".cache/huggingface/hub"),
            (None, None, None) => std::env::temp_dir().join("huggingface/hub"),
        };
        let token = set("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let offline = set("HF_HUB_OFFLINE").is_some_and(|v| {
            !matches!(
                v.to_ascii_lowercase().as_str(),
                "0" | "no" | "false" | "off"
            )
        });
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token: token.map(|t| t.trim().to_owned()),
            offline,
            progress: None,
        }
    }
}

impl Default for HubOptions {
    fn default() -> Self {
        Self::from_env()
    }
}

/// A connection to the Hub and its cache.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    api: Api,
    cache: Cache,
}

impl Hub {
    /// Sets the connection up; nothing is sent yet.
    pub fn new(options: HubOptions) -> Result<Self, HubError> {
        let cache = Cache::new(options.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("nitro", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| HubError::Cache {
                cache: options.cache.clone(),
                reason: e.to_string(),
            })?;
        Ok(Self {
            options,
            api,
            cache,
        })
    }

    /// The path of `file` of `repo` (`org/name`, main branch) in the cache, downloaded if need be.
    ///
    /// A file already in the cache is used as it is, without asking the network.
    pub fn file(&self, repo: &str, file: &str) -> Result<PathBuf, HubError> {
        self.fetch(repo, &Repo::model(repo.to_owned()), file)
    }

    /// As [`Hub::file`], of a dataset.
    pub fn dataset_file(&self, repo: &str, file: &str) -> Result<PathBuf, HubError> {
        self.fetch(repo, &Repo::dataset(repo.to_owned()), file)
    }

    fn fetch(&self, repo: &str, place: &Repo, file: &str) -> Result<PathBuf, HubError> {
        if let Some(path) = self.cache.repo(place.clone()).get(file) {
            return Ok(path);
        }
        if self.options.offline {
            return Err(HubError::Offline {
                repo: repo.to_owned(),
                file: file.to_owned(),
                cache: self.options.cache.clone(),
            });
        }
        self.download(repo, place, file)
            .map_err(|e| self.explain(repo, file, &e))
    }

    fn download(&self, repo: &str, place: &Repo, file: &str) -> Result<PathBuf, ApiError> {
        let remote = self.api.repo(place.clone());
        let metadata = self.api.metadata(&remote.url(file))?;
        let size = metadata.size() as u64;
        let partial = self
            .cache
            .repo(place.clone())
            .blob_path(metadata.etag())
            .with_extension("part");
        // A run that was stopped between the last byte and the renaming leaves a complete `.part`,
        // and asking for the bytes after its end is an error: fetch the last byte once more. A longer
        // one is not ours to complete.
        match std::fs::metadata(&partial).map(|m| m.len()) {
            Ok(have) if have > size => std::fs::remove_file(&partial)?,
            Ok(have) if have == size && size > 0 => {
                std::fs::OpenOptions::new()
                    .write(true)
                    .open(&partial)?
                    .set_len(size - 1)?;
            }
            _ => {}
        }
        let progress = Relay {
            to: self.options.progress.clone(),
            repo: repo.to_owned(),
            counted: 0,
            high: 0,
        };
        let path = remote.download_with_progress(file, progress)?;
        let have = std::fs::metadata(&path)?.len();
        if have != size {
            // A server that ignores ranges, or closed early: what is there is not the file.
            let blob = std::fs::canonicalize(&path)?;
            std::fs::remove_file(&path)?;
            std::fs::remove_file(blob)?;
            let why = format!("{have} bytes arrived, the server announced {size}");
            return Err(std::io::Error::other(why).into());
        }
        Ok(path)
    }

    fn explain(&self, repo: &str, file: &str, error: &ApiError) -> HubError {
        let endpoint = self.options.endpoint.clone();
        let (repo, file) = (repo.to_owned(), file.to_owned());
        match error {
            ApiError::TooManyRetries(inner) => self.explain(&repo, &file, inner),
            ApiError::RequestError(request) => match **request {
                ureq::Error::StatusCode(status @ (401 | 403)) => HubError::Refused {
                    repo,
                    endpoint,
                    status,
                    token_state: match self.options.token {
                        Some(_) => "the token in use was sent and has no access",
                        None => "no token was sent",
                    },
                },
                ureq::Error::StatusCode(404) => HubError::NotFound {
                    repo,
                    file,
                    endpoint,
                },
                ref other => HubError::Transfer {
                    repo,
                    file,
                    endpoint,
                    reason: other.to_string(),
                },
            },
            ApiError::LockAcquisition(lock) => HubError::Cache {
                cache: self.options.cache.clone(),
                reason: format!(
                    "another process is downloading {repo}/{file} (it holds {})",
                    lock.display()
                ),
            },
            ApiError::IoError(io)
                if matches!(
                    io.kind(),
                    std::io::ErrorKind::PermissionDenied
                        | std::io::ErrorKind::StorageFull
                        | std::io::ErrorKind::ReadOnlyFilesystem
                        | std::io::ErrorKind::NotADirectory
                        | std::io::ErrorKind::AlreadyExists
                        | std::io::ErrorKind::NotFound
                ) =>
            {
                HubError::Cache {
                    cache: self.options.cache.clone(),
                    reason: io.to_string(),
                }
            }
            other => HubError::Transfer {
                repo,
                file,
                endpoint,
                reason: other.to_string(),
            },
        }
    }
}

/// Passes `hf-hub`'s progress on, counting each byte once however often a transfer starts over.
struct Relay {
    to: Option<Arc<dyn DownloadProgress>>,
    repo: String,
    counted: u64,
    high: u64,
}

impl Progress for Relay {
    fn init(&mut self, size: usize, filename: &str) {
        // `init` comes once per attempt; only the first one announces the file.
        if self.high == 0
            && self.counted == 0
            && let Some(to) = &self.to
        {
            to.start(&self.repo, filename, size as u64);
        }
        self.counted = 0;
    }

    fn update(&mut self, size: usize) {
        self.counted += size as u64;
        if self.counted > self.high {
            if let Some(to) = &self.to {
                to.advance(self.counted - self.high);
            }
            self.high = self.counted;
        }
    }

    fn finish(&mut self) {
        if let Some(to) = &self.to {
            to.finish();
        }
    }
}
