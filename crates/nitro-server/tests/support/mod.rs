//! A real server on a loopback port, and clients that speak real HTTP to it.
#![allow(dead_code)] // each test binary uses its part

pub(crate) mod schema;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nitro_pipeline::{Pipeline, PipelineError};
use nitro_server::{EngineOptions, RequestLimits, ServeError, Server, ServerOptions, Stopper};
use serde_json::{Value, json};

/// The golden pipeline's model: the official layout, every variant, tiny random weights.
pub(crate) fn golden_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline/model")
}

pub(crate) fn load() -> Result<Vec<Pipeline>, PipelineError> {
    Pipeline::builder(golden_model()).load_with(&["dist".to_owned(), "grpo".to_owned()])
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Load(#[from] PipelineError),
}

/// A running server; it stops when dropped.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) stopper: Stopper,
    pub(crate) thread: Option<JoinHandle<Result<(), RunError>>>,
}

/// Options for tests: any port, generous steps.
pub(crate) fn options() -> ServerOptions {
    ServerOptions {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        limits: RequestLimits {
            steps: 1000,
            ..RequestLimits::default()
        },
        ..ServerOptions::default()
    }
}

/// One picture at a time, and so many that wait.
pub(crate) fn narrow(max_queue: usize) -> ServerOptions {
    ServerOptions {
        engine: EngineOptions {
            max_batch: 1,
            max_queue,
            ..EngineOptions::default()
        },
        ..options()
    }
}

impl TestServer {
    pub(crate) fn start(options: ServerOptions) -> Self {
        let server = Server::bind(options).unwrap();
        let (address, stopper) = (server.address(), server.stopper());
        let (tell, ready) = std::sync::mpsc::channel();
        let run = move || {
            server.run(
                || Ok::<_, RunError>(load()?),
                move || tell.send(()).unwrap(),
            )
        };
        let thread = Some(std::thread::spawn(run));
        ready.recv().expect("the server loads its model");
        Self {
            address,
            stopper,
            thread,
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], &[])
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        let kind = [("content-type", "application/json")];
        self.request("POST", path, &kind, body.to_string().as_bytes())
    }

    pub(crate) fn generate(&self, body: &Value) -> Answer {
        self.post("/v1/images/generations", body)
    }

    /// A form: texts, and files by name.
    pub(crate) fn form(
        &self,
        path: &str,
        fields: &[(&str, &str)],
        files: &[(&str, &[u8])],
    ) -> Answer {
        let (kind, body) = form(fields, files);
        self.request("POST", path, &[("content-type", &kind)], &body)
    }

    /// Sends a request and reads the whole answer.
    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut builder = ureq::http::Request::builder()
            .method(method)
            .uri(self.url(path));
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(Duration::from_secs(120)))
            .build();
        let request = builder.body(body).unwrap();
        let mut response = ureq::Agent::new_with_config(config).run(request).unwrap();
        let headers = response.headers().iter();
        let headers = headers.map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned()));
        Answer {
            status: response.status().as_u16(),
            headers: headers.collect(),
            body: response
                .body_mut()
                .with_config()
                .limit(1 << 30)
                .read_to_vec()
                .unwrap(),
        }
    }

    /// Sends a request and leaves without an answer when the returned connection is dropped.
    pub(crate) fn send_only(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let body = body.to_string();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        stream
    }

    /// A metric's value; labels are part of the name.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub(crate) fn wait_for(&self, name: &str, value: f64) {
        let began = Instant::now();
        while self.metric(name) != value {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{name} stays at {}",
                self.metric(name)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the server's end.
    pub(crate) fn join(mut self) -> Result<(), RunError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stopper.stop();
            self.stopper.stop();
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap().unwrap();
            }
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {} {}", self.status, self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.status, 200, "{}", self.text());
        self
    }

    /// The files of an Images answer.
    pub(crate) fn files(&self) -> Vec<Vec<u8>> {
        let json = self.json();
        let data = json["data"].as_array().unwrap();
        data.iter().map(|d| decode(&d["b64_json"])).collect()
    }

    /// Server-sent events: names and data.
    pub(crate) fn events(&self) -> Vec<(String, Value)> {
        let text = self.text();
        text.split("\n\n")
            .filter(|event| event.contains("event:"))
            .map(|event| {
                let field = |name: &str| {
                    let value = event.lines().find_map(|line| line.strip_prefix(name));
                    value.unwrap_or_default().trim().to_owned()
                };
                (
                    field("event:"),
                    serde_json::from_str(&field("data:")).unwrap(),
                )
            })
            .collect()
    }
}

pub(crate) fn decode(base64: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(base64.as_str().unwrap()).unwrap()
}

/// A multipart body and its content type.
pub(crate) fn form(fields: &[(&str, &str)], files: &[(&str, &[u8])]) -> (String, Vec<u8>) {
    let boundary = "the-boundary-of-this-form";
    let mut body = Vec::new();
    for (name, value) in fields {
        write!(
            body,
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
        )
        .unwrap();
    }
    for (name, file) in files {
        write!(
            body,
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"; \
             filename=\"{name}.png\"\r\nContent-Type: image/png\r\n\r\n"
        )
        .unwrap();
        body.extend_from_slice(file);
        body.extend_from_slice(b"\r\n");
    }
    write!(body, "--{boundary}--\r\n").unwrap();
    (format!("multipart/form-data; boundary={boundary}"), body)
}

/// A request for one picture of the fast variant.
pub(crate) fn quick(prompt: &str, seed: u64) -> Value {
    json!({"prompt": prompt, "seed": seed, "num_inference_steps": 2})
}

/// A request that takes long enough for whatever happens meanwhile.
pub(crate) fn long() -> Value {
    json!({"prompt": "a lighthouse", "seed": 1, "num_inference_steps": 1000})
}

/// The head of an answer on a bare connection.
pub(crate) fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}
