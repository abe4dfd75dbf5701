//! One request, and what came of it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

const SHAPES: [&str; 6] = ["circle", "square", "triangle", "star", "ring", "heart"];
const COLOURS: [&str; 6] = ["red", "blue", "green", "yellow", "pink", "orange"];

/// Who is asked, and for what.
pub(crate) struct Target {
    pub(crate) url: String,
    pub(crate) key: Option<String>,
    /// Parameters of every request besides prompt and seed.
    pub(crate) body: Value,
}

/// How a request ended.
pub(crate) enum End {
    /// In its pictures.
    Pictures(usize),
    /// In a refusal that says when to come again, by status.
    Refused(u16),
    /// There was no more time to wait.
    Unfinished,
    /// In something else.
    Error(String),
}

/// A connection that is kept between requests.
pub(crate) fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .proxy(None)
        .build();
    ureq::Agent::new_with_config(config)
}

impl Target {
    /// Asks for a picture, a different one for each number, and waits until `until` at most.
    pub(crate) fn ask(&self, agent: &ureq::Agent, number: usize, until: Instant) -> End {
        let mut body = self.body.clone();
        let shape = SHAPES[number % SHAPES.len()];
        let colour = COLOURS[(number / SHAPES.len()) % COLOURS.len()];
        body["prompt"] = json!(format!("a {colour} {shape}"));
        body["seed"] = json!(number);
        let left = until.saturating_duration_since(Instant::now());
        let mut request = agent
            .post(format!("{}/v1/images/generations", self.url))
            .config()
            // Zero would mean no limit.
            .timeout_global(Some(left.max(Duration::from_millis(1))))
            .build()
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let answer = request.send(body.to_string()).and_then(|mut response| {
            let text = response
                .body_mut()
                .with_config()
                .limit(1 << 30)
                .read_to_string()?;
            Ok((response, text))
        });
        match answer {
            Ok((response, text)) => {
                let status = response.status().as_u16();
                let retry = response.headers().contains_key("retry-after");
                match status {
                    200 if text.contains("b64_json") => {
                        End::Pictures(text.matches("b64_json").count())
                    }
                    429 | 503 if retry => End::Refused(status),
                    _ => End::Error(format!("{status}: {text:.200}")),
                }
            }
            Err(_) if Instant::now() >= until => End::Unfinished,
            Err(error) => End::Error(error.to_string()),
        }
    }

    /// A number from `/metrics`; NaN where it is not told.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = ureq::get(format!("{}/metrics", self.url))
            .call()
            .and_then(|answer| answer.into_body().read_to_string());
        let text = text.unwrap_or_default();
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|v| v.parse().ok()).unwrap_or(f64::NAN)
    }

    /// The server's resident memory in MiB.
    pub(crate) fn memory(&self) -> f64 {
        self.metric("process_resident_memory_bytes") / f64::from(1 << 20)
    }
}

/// Seconds below which that share of sorted times lies.
pub(crate) fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(at).map_or(f64::NAN, Duration::as_secs_f64)
}

/// The first errors.
pub(crate) fn show(errors: &[String]) {
    for error in errors.iter().take(3) {
        eprintln!("error: {error}");
    }
}
