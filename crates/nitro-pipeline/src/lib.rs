//! Prompt to picture: caption cleaning, tokenisation, model folders and the Hub, the pipeline, PNG with metadata.
