//! A Hugging Face Hub of a few folders on loopback: resolve addresses with commit and etag headers,
//! redirects of large files to a content server, byte ranges, gated repositories, broken transfers.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The commit that every repository is at.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The token that opens gated repositories.
pub(crate) const TOKEN: &str = "hf_test_token";

/// A request that the server got.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Path of the address.
    pub(crate) path: String,
    /// `Range` header.
    pub(crate) range: Option<String>,
    /// `Authorization` header.
    pub(crate) authorization: Option<String>,
}

/// How the server behaves.
#[derive(Clone, Default)]
pub(crate) struct Behaviour {
    /// Repositories that want the token.
    pub(crate) gated: Vec<String>,
    /// Files whose transfers break after so many bytes, and how many times that happens.
    pub(crate) breaks: HashMap<String, (usize, usize)>,
}

struct State {
    repositories: HashMap<String, PathBuf>,
    behaviour: Mutex<Behaviour>,
    seen: Mutex<Vec<Seen>>,
    address: String,
    stopped: AtomicBool,
}

/// The running server; it stops when dropped.
pub(crate) struct HubServer {
    state: Arc<State>,
    port: u16,
}

impl HubServer {
    /// Serves each folder as the repository `org/name`.
    pub(crate) fn start(
        repositories: impl IntoIterator<Item = (&'static str, PathBuf)>,
        behaviour: Behaviour,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            repositories: repositories
                .into_iter()
                .map(|(n, p)| (n.to_owned(), p))
                .collect(),
            behaviour: Mutex::new(behaviour),
            seen: Mutex::default(),
            address: format!("http://127.0.0.1:{port}"),
            stopped: AtomicBool::new(false),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let shared = shared.clone();
                // A client that goes away is the client's business.
                std::thread::spawn(move || stream.and_then(|stream| answer(&shared, stream)));
            }
        });
        Self { state, port }
    }

    /// The golden pipeline's files under the official names.
    pub(crate) fn official(behaviour: Behaviour) -> Self {
        let model = super::golden_model();
        Self::start(
            [
                ("amd/Nitro-E", model.clone()),
                (
                    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
                    model.join("dc-ae"),
                ),
                ("meta-llama/Llama-3.2-1B", model.join("text_encoder")),
            ],
            behaviour,
        )
    }

    /// For `HF_ENDPOINT`.
    pub(crate) fn address(&self) -> &str {
        &self.state.address
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // Wakes the loop, which then sees the flag.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn answer(state: &State, stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned();
    let head_only = line.starts_with("HEAD");
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let header = |name: &str| headers.get(name).cloned();
    let seen = Seen {
        path: path.clone(),
        range: header("range"),
        authorization: header("authorization"),
    };
    state.seen.lock().unwrap().push(seen.clone());
    respond(state, stream, &seen, head_only)
}

fn respond(
    state: &State,
    mut stream: TcpStream,
    seen: &Seen,
    head_only: bool,
) -> std::io::Result<()> {
    let mut refuse = |status: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    };
    let (content_server, path) = match seen.path.strip_prefix("/content/") {
        Some(path) => (true, path),
        None => (false, seen.path.trim_start_matches('/')),
    };
    let Some((repository, file)) = path.split_once("/resolve/main/") else {
        return refuse("404 Not Found");
    };
    let Some(folder) = state.repositories.get(repository) else {
        // What the Hub says of a repository that does not exist.
        return refuse("401 Unauthorized");
    };
    let gated = state
        .behaviour
        .lock()
        .unwrap()
        .gated
        .iter()
        .any(|g| g == repository);
    if gated && !content_server {
        match seen.authorization.as_deref() {
            Some(sent) if sent == format!("Bearer {TOKEN}") => {}
            Some(_) => return refuse("403 Forbidden"),
            None => return refuse("401 Unauthorized"),
        }
    }
    let Ok(content) = std::fs::read(folder.join(file)) else {
        return refuse("404 Not Found");
    };
    let etag = format!("etag-{}-{}", file.replace(['/', '.'], "-"), content.len());
    let common = format!("X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n");
    if file.ends_with(".safetensors") && !content_server {
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\n{common}ETag: \"pointer\"\r\nX-Linked-ETag: \"{etag}\"\r\n\
             X-Linked-Size: {}\r\nLocation: {}/content/{path}\r\nContent-Length: 0\r\n\r\n",
            content.len(),
            state.address,
        );
    }
    let (status, start, end) = match seen.range.as_deref().map(|r| parse_range(r, content.len())) {
        None => ("200 OK", 0, content.len()),
        Some(Some((start, end))) => ("206 Partial Content", start, end),
        Some(None) => return refuse("416 Range Not Satisfiable"),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{common}ETag: \"{etag}\"\r\nAccept-Ranges: bytes\r\n\
         Content-Range: bytes {start}-{}/{}\r\nContent-Length: {}\r\n\r\n",
        end.saturating_sub(1),
        content.len(),
        end - start,
    )?;
    if head_only {
        return Ok(());
    }
    let mut body = &content[start..end];
    // Questions for the size (bytes=0-0) do not count as transfers.
    if body.len() > 1
        && let Some((bytes, times)) = state.behaviour.lock().unwrap().breaks.get_mut(file)
        && *times > 0
    {
        *times -= 1;
        body = &body[..body.len().min(*bytes)];
    }
    stream.write_all(body)
}

/// `bytes=A-` or `bytes=A-B` as a half-open range, if it begins inside the content.
fn parse_range(range: &str, length: usize) -> Option<(usize, usize)> {
    let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = end
        .parse::<usize>()
        .map_or(length, |end| (end + 1).min(length));
    (start < end).then_some((start, end))
}
