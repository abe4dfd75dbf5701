//! What clients of the image service send and get, without the service: the objects of OpenAI's Images
//! API ([`openai`]) and AUTOMATIC1111's ([`a1111`]), their readers ([`parse`], [`picture`]), and errors
//! ([`ApiError`]). The same types read requests, write answers and describe both in OpenAPI.
//!
//! A reader turns bytes into a [`Wish`] or an [`ApiError`] and never panics; there is no model here, so
//! `fuzz/` builds in seconds.

pub mod a1111;
mod error;
pub mod openai;
pub mod parse;
pub mod picture;
mod wish;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use wish::{Start, Wish};

/// Every reader from its bytes to the end, for property tests and `fuzz/`: none may panic. Each says
/// whether the bytes can be meant.
#[doc(hidden)]
pub mod readers {
    use axum::body::Bytes;

    use crate::{a1111, openai, picture};

    /// Bodies of `/v1/images/generations`.
    pub fn generation(body: &[u8]) -> bool {
        let read = openai::generation(body);
        read.is_ok_and(|p| p.answer().is_ok() && p.wish(None).is_ok())
    }

    /// Forms of `/v1/images/edits`, the pictures included.
    pub fn edit(content_type: &str, body: &[u8]) -> bool {
        let read = openai::edit(content_type, Bytes::copy_from_slice(body));
        read.is_ok_and(|edit| edit.start().is_ok() && edit.parameters.wish(None).is_ok())
    }

    /// Bodies of `/sdapi/v1/txt2img`, `img2img` and `png-info`.
    pub fn a1111(body: &[u8]) -> bool {
        let png = a1111::png_info(body).is_ok();
        let read = a1111::request(body).is_ok_and(|mut request| {
            request.wish(None);
            request.take_pictures().start().is_ok()
        });
        png || read
    }

    /// A picture inside a request.
    pub fn picture(bytes: &[u8]) -> bool {
        picture::decode("image", bytes).is_ok()
    }
}
