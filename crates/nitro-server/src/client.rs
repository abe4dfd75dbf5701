//! Who asks: the holder of an API key, or without keys an address.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use subtle::{Choice, ConstantTimeEq};

/// Keys are compared as blocks of this many bytes, so that their lengths stay secret too.
const KEY_BYTES: usize = 256;

/// Shorter keys can be guessed.
const SHORTEST_KEY: usize = 16;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file could not be read.
    #[error("cannot read the key file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is no key.
    #[error("key file {path}, line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no key in it.
    #[error(
        "key file {path} holds no key; write one per line, optionally after a name and a space"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The keys that open the server. Without any, everybody may ask.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    name: Arc<str>,
    secret: [u8; KEY_BYTES],
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|k| &k.name))
            .finish()
    }
}

impl Keys {
    /// Reads a file with one key per line, each optionally after a name for logs and a space; empty
    /// lines and lines that begin with `#` do not count.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let text = std::fs::read_to_string(path).map_err(|source| KeyError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, KeyError> {
        let mut keys = Self::default();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, secret) = match line.split_once(char::is_whitespace) {
                Some((name, secret)) => (name.to_owned(), secret.trim()),
                None => (format!("key-{}", i + 1), line),
            };
            keys.add(&name, secret).map_err(|reason| KeyError::Line {
                path: path.to_owned(),
                line: i + 1,
                reason,
            })?;
        }
        match keys.is_empty() {
            true => Err(KeyError::Empty {
                path: path.to_owned(),
            }),
            false => Ok(keys),
        }
    }

    /// Adds one key.
    pub fn add(&mut self, name: &str, secret: &str) -> Result<(), String> {
        if !(SHORTEST_KEY..=KEY_BYTES).contains(&secret.len()) {
            return Err(format!(
                "a key of {} characters; use {SHORTEST_KEY} to {KEY_BYTES}",
                secret.len()
            ));
        }
        if !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("a key may hold visible ASCII characters only".to_owned());
        }
        self.0.push(Key {
            name: name.into(),
            secret: block(secret.as_bytes()),
        });
        Ok(())
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name of the key `sent`. Takes the same time for every wrong key and looks at all keys.
    fn find(&self, sent: &str) -> Option<&Arc<str>> {
        let fits = Choice::from(u8::from(sent.len() <= KEY_BYTES));
        let sent = block(sent.as_bytes());
        let mut found = None;
        for key in &self.0 {
            if bool::from(key.secret.ct_eq(&sent) & fits) {
                found = Some(&key.name);
            }
        }
        found
    }

    /// Who sent these headers: `Authorization: Bearer KEY`, `X-Api-Key: KEY`, or the password of
    /// basic authentication, which AUTOMATIC1111's clients use.
    pub(crate) fn client(
        &self,
        headers: &axum::http::HeaderMap,
        address: IpAddr,
    ) -> Result<Client, Unauthorized> {
        if self.is_empty() {
            return Ok(Client::Address(address));
        }
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let bearer = text("authorization").and_then(|value| {
            let (scheme, rest) = value.split_once(' ')?;
            let rest = rest.trim();
            if scheme.eq_ignore_ascii_case("bearer") {
                return Some(rest.to_owned());
            }
            let decoded = scheme
                .eq_ignore_ascii_case("basic")
                .then(|| BASE64_STANDARD.decode(rest).ok())??;
            let decoded = String::from_utf8(decoded).ok()?;
            decoded.split_once(':').map(|(_, key)| key.to_owned())
        });
        let sent = bearer.or_else(|| text("x-api-key").map(str::to_owned));
        match sent {
            None => Err(Unauthorized::Missing),
            Some(sent) => match self.find(&sent) {
                Some(name) => Ok(Client::Key(name.clone())),
                None => Err(Unauthorized::Wrong),
            },
        }
    }
}

/// Why a request is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unauthorized {
    Missing,
    Wrong,
}

fn block(bytes: &[u8]) -> [u8; KEY_BYTES] {
    let mut block = [0; KEY_BYTES];
    let length = bytes.len().min(KEY_BYTES);
    block[..length].copy_from_slice(&bytes[..length]);
    block
}

/// Who a request belongs to: the holder of a key, or without keys whoever has the address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Client {
    Key(Arc<str>),
    Address(IpAddr),
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderMap, HeaderValue};

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn keys() -> Keys {
        Keys::parse(
            "# two keys\n\nalice   aaaaaaaaaaaaaaaaaaaa\nbbbbbbbbbbbbbbbbbbbb\n",
            Path::new("keys"),
        )
        .unwrap()
    }

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            axum::http::HeaderName::from_static(name),
            HeaderValue::from_str(value).unwrap(),
        )])
    }

    #[test]
    fn keys_are_found_wherever_clients_put_them() {
        let keys = keys();
        let name = |headers: HeaderMap| keys.client(&headers, HOME).map(|c| c.to_string());
        let basic = BASE64_STANDARD.encode("user:bbbbbbbbbbbbbbbbbbbb");
        assert_eq!(
            name(with("authorization", "Bearer aaaaaaaaaaaaaaaaaaaa")),
            Ok("alice".into())
        );
        assert_eq!(
            name(with("authorization", &format!("basic {basic}"))),
            Ok("key-4".into())
        );
        assert_eq!(
            name(with("x-api-key", "bbbbbbbbbbbbbbbbbbbb")),
            Ok("key-4".into())
        );
        for wrong in ["aaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaab", "", "\u{61}"] {
            assert_eq!(name(with("x-api-key", wrong)), Err(Unauthorized::Wrong));
        }
        let long = "a".repeat(KEY_BYTES + 1);
        assert_eq!(name(with("x-api-key", &long)), Err(Unauthorized::Wrong));
        assert_eq!(name(HeaderMap::new()), Err(Unauthorized::Missing));
        assert_eq!(
            Keys::default().client(&HeaderMap::new(), HOME),
            Ok(Client::Address(HOME))
        );
        assert!(
            !format!("{keys:?}").contains("aaaa"),
            "secrets are not shown"
        );
    }

    #[test]
    fn unusable_key_files_are_refused() {
        let parse = |text| {
            Keys::parse(text, Path::new("keys"))
                .unwrap_err()
                .to_string()
        };
        assert!(parse("# nothing\n").contains("holds no key"));
        assert!(parse("ok aaaaaaaaaaaaaaaaaaaa\nbad short").contains("line 2"));
    }
}
