use sha2::Digest;
use xxhash_rust::{xxh3, xxh32, xxh64};

use crate::{DataError, Result};

/// A hash algorithm of shard files, by mosaicml-streaming's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Hash {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Xxh128,
    Xxh32,
    Xxh3_128,
    Xxh3_64,
    Xxh64,
}

const NAMES: [(Hash, &str); 11] = [
    (Hash::Md5, "md5"),
    (Hash::Sha1, "sha1"),
    (Hash::Sha224, "sha224"),
    (Hash::Sha256, "sha256"),
    (Hash::Sha384, "sha384"),
    (Hash::Sha512, "sha512"),
    (Hash::Xxh128, "xxh128"),
    (Hash::Xxh32, "xxh32"),
    (Hash::Xxh3_128, "xxh3_128"),
    (Hash::Xxh3_64, "xxh3_64"),
    (Hash::Xxh64, "xxh64"),
];

impl Hash {
    /// The name in `index.json`.
    pub fn name(self) -> &'static str {
        NAMES[self as usize].1
    }

    /// The algorithm of this name.
    pub fn from_name(name: &str) -> Result<Self> {
        let known = NAMES
            .iter()
            .find(|(_, n)| *n == name)
            .map(|(hash, _)| *hash);
        known.ok_or_else(|| DataError::Unknown {
            what: "hash",
            name: name.to_owned(),
            expected: "md5, sha1, sha224, sha256, sha384, sha512, xxh32, xxh64, xxh128, xxh3_64 or \
                       xxh3_128",
        })
    }

    /// The digest in hexadecimal, as Python's `hexdigest()` prints it.
    pub fn digest(self, data: &[u8]) -> String {
        fn hex(bytes: impl AsRef<[u8]>) -> String {
            bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
        }
        match self {
            Hash::Md5 => hex(md5::Md5::digest(data)),
            Hash::Sha1 => hex(sha1::Sha1::digest(data)),
            Hash::Sha224 => hex(sha2::Sha224::digest(data)),
            Hash::Sha256 => hex(sha2::Sha256::digest(data)),
            Hash::Sha384 => hex(sha2::Sha384::digest(data)),
            Hash::Sha512 => hex(sha2::Sha512::digest(data)),
            Hash::Xxh32 => hex(xxh32::xxh32(data, 0).to_be_bytes()),
            Hash::Xxh64 => hex(xxh64::xxh64(data, 0).to_be_bytes()),
            Hash::Xxh3_64 => hex(xxh3::xxh3_64(data).to_be_bytes()),
            Hash::Xxh128 | Hash::Xxh3_128 => hex(xxh3::xxh3_128(data).to_be_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_python() {
        // hashlib and xxhash on b"nitro".
        let expected = [
            (Hash::Md5, "db6e40bd32fe08f8740e3e24cc785e6c"),
            (Hash::Sha1, "72611550180caa6f217dd785a7b8c3e862e8c91b"),
            (
                Hash::Sha224,
                "bd6404c96b726ba0947215420eb89008c9dd8a2ef04b591601ca15c8",
            ),
            (
                Hash::Sha384,
                "9588768a9cc95ebca869222be28a56d489fbe6c95cfe765029b4a5450b20b2d858c78be25dfef6a1b454613a39f6d284",
            ),
            (Hash::Xxh32, "bcfb7ab5"),
            (Hash::Xxh64, "2a001e213cdf519a"),
            (Hash::Xxh128, "0718ad9181302fef99b238b139bfe1e1"),
            (Hash::Xxh3_64, "1b95a915626b33e7"),
        ];
        for (hash, digest) in expected {
            assert_eq!(hash.digest(b"nitro"), digest, "{}", hash.name());
        }
        for (i, (hash, name)) in NAMES.into_iter().enumerate() {
            assert_eq!(hash as usize, i);
            assert_eq!(Hash::from_name(name).unwrap(), hash);
        }
        assert!(Hash::from_name("crc32").is_err());
    }
}
