use serde::Serialize;

use super::{Content, Payload, Skip};
use crate::image::{Filter, decode, dimensions, encode_jpeg, is_jpeg, resize_shorter};

/// Which pictures are taken, and how they are changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PictureRules {
    /// Pictures with a shorter side below this are left out.
    pub min_side: u32,
    /// Pictures with a shorter side above this are shrunk to it (bicubic).
    pub max_side: Option<u32>,
    /// Quality of pictures that are encoded anew; JPEG files that fit are copied byte for byte.
    pub jpeg_quality: u8,
    /// Take a JPEG file's word for it: do not decode what is only copied.
    pub trust: bool,
}

impl Default for PictureRules {
    fn default() -> Self {
        Self {
            min_side: 1,
            max_side: None,
            jpeg_quality: 95,
            trust: false,
        }
    }
}

impl PictureRules {
    /// The caption and the JPEG file to store, or why not.
    pub(super) fn prepare(&self, content: Content) -> Result<(String, Option<Vec<u8>>), Skip> {
        let caption = super::caption(&content.caption)?;
        let bytes = match content.picture {
            None => return Ok((caption, None)),
            Some(Payload::Bytes(bytes)) => bytes,
            Some(Payload::File(path)) => std::fs::read(&path).map_err(|e| {
                let reason = match e.kind() {
                    std::io::ErrorKind::NotFound => "no picture",
                    _ => "unreadable picture",
                };
                Skip::new(reason, e.to_string())
            })?,
        };
        self.picture(bytes).map(|picture| (caption, Some(picture)))
    }

    fn picture(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Skip> {
        let undecodable = |detail: String| Skip::new("undecodable picture", detail);
        let (width, height) = dimensions(&bytes).map_err(undecodable)?;
        let side = width.min(height);
        if side < self.min_side {
            let detail = format!("{width} x {height}");
            return Err(Skip::new("smaller than the smallest side", detail));
        }
        let shrink = self.max_side.filter(|most| side > *most);
        if is_jpeg(&bytes) && shrink.is_none() {
            if !self.trust {
                decode(&bytes).map_err(undecodable)?;
            }
            return Ok(bytes);
        }
        let mut picture = decode(&bytes).map_err(undecodable)?;
        if let Some(most) = shrink {
            picture = resize_shorter(&picture, most, Filter::Bicubic);
        }
        encode_jpeg(&picture, self.jpeg_quality).map_err(undecodable)
    }
}
