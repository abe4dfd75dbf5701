//! Reward servers in flow_grpo's protocol: a POST of a pickled dictionary `{"images": [JPEG bytes],
//! "meta_datas": [...], "only_strict": False}`, answered by one with a list of scores (source:
//! yifan123/flow_grpo, `flow_grpo/rewards.py`, `geneval_score`).

use std::time::Duration;

use image::codecs::jpeg::JpegEncoder;
use nitro_eval::geneval::Metadata;

use super::pickle::{Value, dumps, loads};
use super::{Sample, Scorer};

/// Pictures in one request.
const BATCH: usize = 64;
/// Pillow's default quality.
const QUALITY: u8 = 75;
/// No answer is longer than this.
const MAX_ANSWER: u64 = 64 << 20;

/// A reward server.
pub struct HttpScorer {
    url: String,
    field: String,
    retries: u32,
    agent: ureq::Agent,
}

impl HttpScorer {
    /// The server at `url`, whose answer holds the scores in `field`; asked again `retries` times, a
    /// second apart, when it cannot be reached or fails.
    pub fn new(url: &str, field: &str, timeout_seconds: u64, retries: u32) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(timeout_seconds.max(1))))
            .http_status_as_error(false)
            .build();
        Self {
            url: url.to_owned(),
            field: field.to_owned(),
            retries,
            agent: config.into(),
        }
    }

    fn ask(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut answer = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/octet-stream")
            .send(body)
            .map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("it answered {}", answer.status()));
        }
        let body = answer.body_mut().with_config().limit(MAX_ANSWER);
        body.read_to_vec().map_err(|error| error.to_string())
    }

    fn ask_again(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut left = self.retries;
        loop {
            match self.ask(body) {
                Ok(answer) => return Ok(answer),
                Err(_) if left > 0 => {
                    left -= 1;
                    std::thread::sleep(Duration::from_secs(1));
                }
                Err(reason) => {
                    return Err(format!(
                        "{} did not answer ({reason}) after {} tries; is the reward server running?",
                        self.url,
                        self.retries + 1
                    ));
                }
            }
        }
    }
}

impl Scorer for HttpScorer {
    fn score(&self, samples: &[Sample<'_>]) -> Result<Vec<f64>, String> {
        let mut scores = Vec::with_capacity(samples.len());
        for batch in samples.chunks(BATCH) {
            let answer = self.ask_again(&dumps(&request(batch)?))?;
            let answer = loads(&answer).map_err(|e| format!("{}: {e}", self.url))?;
            let list = answer.get(&self.field).and_then(Value::numbers);
            let list = list.filter(|list| list.len() == batch.len());
            scores.extend(list.ok_or_else(|| {
                format!(
                    "{}: its answer has no list `{}` of {} numbers",
                    self.url,
                    self.field,
                    batch.len()
                )
            })?);
        }
        Ok(scores)
    }
}

fn request(samples: &[Sample<'_>]) -> Result<Value, String> {
    let text = |s: &str| Value::Text(s.to_owned());
    let mut images = Vec::new();
    for sample in samples {
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
            .encode_image(sample.picture)
            .map_err(|error| error.to_string())?;
        images.push(Value::Bytes(jpeg));
    }
    let metadata = |m: &Metadata| serde_json::from_str(&m.to_json()).map(|m| Value::from_json(&m));
    let metadata = samples.iter().map(|sample| metadata(sample.metadata));
    let metadata = metadata.collect::<Result<_, _>>();
    let metadata = metadata.map_err(|error| error.to_string())?;
    Ok(Value::Dict(vec![
        (text("images"), Value::List(images)),
        (text("meta_datas"), Value::List(metadata)),
        (text("only_strict"), Value::Bool(false)),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};

    /// One HTTP request's body.
    fn read_body(stream: &TcpStream) -> Vec<u8> {
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let line = line.trim().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        body
    }

    fn answer(mut stream: TcpStream, status: &str, body: &[u8]) {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
    }

    /// Answers with `answers` in turn, and returns the bodies that were sent.
    fn server(
        answers: Vec<(&'static str, Vec<u8>)>,
    ) -> (String, std::thread::JoinHandle<Vec<Vec<u8>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let serve = |(status, body): (&str, Vec<u8>)| {
                let (stream, _) = listener.accept().unwrap();
                let sent = read_body(&stream);
                answer(stream, status, &body);
                sent
            };
            answers.into_iter().map(serve).collect()
        });
        (url, thread)
    }

    fn scores(values: &[f64]) -> Vec<u8> {
        let list = values.iter().map(|v| Value::Float(*v)).collect();
        dumps(&Value::Dict(vec![(
            Value::Text("scores".into()),
            Value::List(list),
        )]))
    }

    fn ask(url: &str, retries: u32) -> Result<Vec<f64>, String> {
        let metadata = Metadata::parse(
            r#"{"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two stars"}"#,
            "here",
        );
        let metadata = metadata.unwrap();
        let picture = RgbImage::from_pixel(16, 16, image::Rgb([200, 10, 10]));
        let sample = Sample {
            metadata: &metadata,
            picture: &picture,
        };
        HttpScorer::new(url, "scores", 10, retries).score(&[sample; 2])
    }

    #[test]
    fn a_server_that_fails_once_is_asked_again() {
        let answers = vec![
            ("500 Internal Server Error", Vec::new()),
            ("200 OK", scores(&[0.25, 1.0])),
        ];
        let (url, thread) = server(answers);
        assert_eq!(ask(&url, 1).unwrap(), [0.25, 1.0]);
        let sent = loads(&thread.join().unwrap()[1]).unwrap();
        let Some(Value::List(images)) = sent.get("images") else {
            panic!("no images in {sent:?}")
        };
        let Value::Bytes(jpeg) = &images[0] else {
            panic!("an image is bytes")
        };
        let decoded = image::load_from_memory(jpeg).unwrap().to_rgb8();
        assert_eq!(decoded.dimensions(), (16, 16));
        let Some(Value::List(metadata)) = sent.get("meta_datas") else {
            panic!("no meta_datas")
        };
        assert_eq!(
            metadata[1].get("tag"),
            Some(&Value::Text("counting".into()))
        );
        assert_eq!(sent.get("only_strict"), Some(&Value::Bool(false)));
    }

    #[test]
    fn wrong_answers_are_told() {
        let (url, _) = server(vec![("200 OK", scores(&[1.0]))]);
        assert!(ask(&url, 0).unwrap_err().contains("`scores` of 2 numbers"));
        let (url, _) = server(vec![("200 OK", b"<html>".to_vec())]);
        assert!(ask(&url, 0).unwrap_err().contains("not plain data"));
        let (url, _) = server(vec![("404 Not Found", Vec::new())]);
        let error = ask(&url, 0).unwrap_err();
        assert!(
            error.contains("404") && error.contains("1 tries"),
            "{error}"
        );
    }
}
