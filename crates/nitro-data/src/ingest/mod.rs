//! Raw image-text sets to shards.
