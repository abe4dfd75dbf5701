//! An HTTP image service over the nitro pipeline.
