//! From a body's bytes to typed parameters, with errors that name the parameter.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{StatusCode, header};
use futures_util::FutureExt as _;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// JSON to parameters.
pub fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    match axum::Json::<T>::from_bytes(bytes) {
        Ok(axum::Json(value)) => Ok(value),
        Err(rejection) => Err(explain(&rejection.body_text())),
    }
}

/// Parameters from an object that is JSON already.
pub fn object<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, ApiError> {
    let bytes = serde_json::to_vec(&object).map_err(|_| ApiError::internal())?;
    json(&bytes)
}

/// A JSON error as axum words it, `STATEMENT: PATH: REASON`, in our form.
fn explain(text: &str) -> ApiError {
    let reason = text.split_once(": ").map_or(text, |(_, reason)| reason);
    if text.starts_with("Failed to parse") {
        return ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_json",
            format!("the body is not JSON: {reason}"),
        );
    }
    // serde quotes names of fields; the path in front of the reason names the field itself.
    let quoted = reason.split('`').nth(1);
    let (code, param) = if reason.contains("unknown field") {
        ("unknown_parameter", quoted)
    } else if reason.contains("missing field") {
        ("missing_required_parameter", quoted)
    } else {
        let path = reason.split_once(": ").map(|(path, _)| path);
        let is_name = |path: &&str| {
            let mut letters = path.chars();
            letters.next().is_some_and(|c| c.is_ascii_alphabetic())
                && letters.all(|c| c.is_ascii_alphanumeric() || "_.[]".contains(c))
        };
        ("invalid_type", path.filter(is_name))
    };
    let error = ApiError::new(StatusCode::BAD_REQUEST, code, reason.to_owned());
    match param {
        Some(param) => error.param(param),
        None => error,
    }
}

/// The parts of a form: files by name, and everything else as text.
#[derive(Debug, Default)]
pub struct Form {
    /// Files, with the names of their parts.
    pub files: Vec<(String, Bytes)>,
    /// Texts, numbers and truth values.
    pub fields: Map<String, Value>,
}

/// Parameters that are numbers or truth values; forms have only text.
const TYPED: [&str; 9] = [
    "n",
    "partial_images",
    "output_compression",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "strength",
    "stream",
    "progress",
];

/// Most parts of a form, so that its size bounds the work it makes.
const MOST_PARTS: usize = 64;

/// Reads a `multipart/form-data` body. `files` names the parts that are pictures.
pub fn form(kind: &str, body: Bytes, files: &[&str]) -> Result<Form, ApiError> {
    // All of the body is here, so there is nothing to wait for.
    let read = read_form(kind, body, files).now_or_never();
    read.unwrap_or_else(|| Err(bad("it cannot be read".to_owned())))
}

fn bad(reason: String) -> ApiError {
    ApiError::new(
        StatusCode::BAD_REQUEST,
        "invalid_form",
        format!("the body is not the multipart/form-data it should be: {reason}"),
    )
}

async fn read_form(kind: &str, body: Bytes, files: &[&str]) -> Result<Form, ApiError> {
    let request = Request::builder()
        .method("POST")
        .header(header::CONTENT_TYPE, kind)
        .body(Body::from(body))
        .map_err(|e| bad(e.to_string()))?;
    let mut multipart = Multipart::from_request(request, &())
        .await
        .map_err(|e| bad(e.body_text()))?;
    let mut form = Form::default();
    let mut parts = 0;
    while let Some(field) = multipart
        .next_field()
        .await
        .map_err(|e| bad(e.body_text()))?
    {
        parts += 1;
        if parts > MOST_PARTS {
            return Err(bad(format!("it has more than {MOST_PARTS} parts")));
        }
        let name = field.name().unwrap_or_default().to_owned();
        // Clients write lists as `image[]`.
        let name = name.strip_suffix("[]").unwrap_or(&name).to_owned();
        if files.contains(&name.as_str()) {
            let bytes = field.bytes().await.map_err(|e| bad(e.body_text()))?;
            form.files.push((name, bytes));
            continue;
        }
        let text = field.text().await.map_err(|e| bad(e.body_text()))?;
        let typed = || serde_json::from_str::<Value>(text.trim()).ok();
        let value = match TYPED.contains(&name.as_str()) {
            true => typed().filter(|v| v.is_number() || v.is_boolean()),
            false => None,
        };
        form.fields
            .insert(name, value.unwrap_or(Value::String(text)));
    }
    Ok(form)
}

/// `WIDTHxHEIGHT` or `auto`.
pub fn size(text: &str) -> Result<Option<(usize, usize)>, ApiError> {
    if text == "auto" {
        return Ok(None);
    }
    let sides = text.split_once('x').and_then(|(width, height)| {
        Some((width.parse::<u16>().ok()?, height.parse::<u16>().ok()?))
    });
    match sides {
        Some((width, height)) => Ok(Some((width.into(), height.into()))),
        None => Err(ApiError::bad(
            "size",
            format!("size {text:?} is not of the form 512x512, nor `auto`"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code)]
        prompt: String,
        #[allow(dead_code)]
        n: Option<u32>,
    }

    #[test]
    fn errors_name_the_parameter() {
        for (body, code, param) in [
            ("{", "invalid_json", None),
            ("[1]", "invalid_type", None),
            (r#"{"n": 1}"#, "missing_required_parameter", Some("prompt")),
            (r#"{"prompt": "a", "n": "two"}"#, "invalid_type", Some("n")),
            (r#"{"prompt": "a", "n": -1}"#, "invalid_type", Some("n")),
            (
                r#"{"prompt": "a", "sed": 7}"#,
                "unknown_parameter",
                Some("sed"),
            ),
        ] {
            let error = json::<Sample>(body.as_bytes()).unwrap_err();
            let detail = error.detail();
            assert_eq!(detail.code.as_deref(), Some(code), "{body}: {detail:?}");
            assert_eq!(detail.param.as_deref(), param, "{body}: {detail:?}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("512x512").unwrap(), Some((512, 512)));
        assert_eq!(size("auto").unwrap(), None);
        for bad in ["", "512", "x", "-1x5", "512x512x3", "99999999x1", "512X512"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
