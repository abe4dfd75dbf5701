//! A load generator for image servers that speak OpenAI's Images API.
//!
//! ```text
//! cargo run --release -p nitro -p nitro-server --example load -- \
//!     --url http://127.0.0.1:8080 --clients 1,2,4,8,16,32,64 --seconds 10,10,10,10,20,30,45
//! ```
//!
//! Each client asks for one picture after the other, each with a prompt and seed of its own. Refusals
//! (429) are honest answers: the client waits a moment and goes on. Anything else that is no picture
//! is an error and ends the run with exit code 1. With `--every N` it prints the server's memory and
//! counts every N seconds, for long runs.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const SHAPES: [&str; 6] = ["circle", "square", "triangle", "star", "ring", "heart"];
const COLOURS: [&str; 6] = ["red", "blue", "green", "yellow", "pink", "orange"];

/// After a refusal; a polite client would wait as long as it is told.
const PAUSE: Duration = Duration::from_millis(50);

struct Arguments(HashMap<String, String>);

impl Arguments {
    fn read() -> Result<Self, String> {
        let mut found = HashMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word
                .strip_prefix("--")
                .ok_or(format!("{word}: expected --NAME"))?;
            let value = words.next().ok_or(format!("--{name} wants a value"))?;
            found.insert(name.to_owned(), value);
        }
        Ok(Self(found))
    }

    fn number(&self, name: &str, default: u64) -> Result<u64, String> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .map_err(|_| format!("--{name} {text}: no number")),
        }
    }
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    latencies: Vec<Duration>,
    refused: usize,
    errors: Vec<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

/// Whether every request ended in a picture or an honest refusal.
fn run() -> Result<bool, String> {
    let arguments = Arguments::read()?;
    let known = |name: &str| arguments.0.get(name).cloned();
    let url = known("url").unwrap_or_else(|| "http://127.0.0.1:8080".to_owned());
    let key = known("key");
    let every = arguments.number("every", 0)?;
    let clients = known("clients").unwrap_or_else(|| "1,2,4,8,16,32,64".to_owned());
    let clients = list("clients", &clients)?;
    let seconds = known("seconds").unwrap_or_else(|| "20".to_owned());
    let seconds = list("seconds", &seconds)?;
    let mut body = json!({});
    for (name, parameter) in [("steps", "num_inference_steps"), ("n", "n")] {
        if arguments.0.contains_key(name) {
            body[parameter] = json!(arguments.number(name, 1)?);
        }
    }
    if let Some(size) = known("size") {
        body["size"] = json!(format!("{size}x{size}"));
    }

    println!("| clients | images/s | p50 s | p95 s | refused | errors | server MiB |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut honest = true;
    for (i, clients) in clients.into_iter().enumerate() {
        // The last length holds for all further counts of clients.
        let seconds = seconds.get(i).or(seconds.last()).copied().unwrap_or(20);
        let seconds = Duration::from_secs(seconds as u64);
        let began = Instant::now();
        let over = AtomicBool::new(false);
        let seen: Mutex<Vec<Seen>> = Mutex::default();
        std::thread::scope(|scope| {
            for client in 0..clients {
                let (url, key, body, seen, over) = (&url, &key, &body, &seen, &over);
                scope.spawn(move || {
                    let mine = one_client(url, key.as_deref(), body, client, began + seconds);
                    seen.lock().unwrap_or_else(|e| e.into_inner()).push(mine);
                    over.store(true, Ordering::SeqCst);
                });
            }
            let mut reported = 0;
            while every > 0 && !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(200));
                let now = began.elapsed().as_secs() / every;
                if now > reported {
                    reported = now;
                    let count = |name: &str| metric(&url, name).unwrap_or(f64::NAN);
                    eprintln!(
                        "{} s: {} pictures, {} waiting, {:.1} MiB",
                        began.elapsed().as_secs(),
                        count("nitro_pictures_total"),
                        count("nitro_pictures_waiting"),
                        memory(&url)
                    );
                }
            }
        });
        let time = began.elapsed().as_secs_f64();
        let seen = seen.into_inner().unwrap_or_else(|e| e.into_inner());
        let mut latencies: Vec<Duration> = Vec::new();
        let (mut refused, mut errors) = (0, Vec::new());
        for one in seen {
            latencies.extend(one.latencies);
            refused += one.refused;
            errors.extend(one.errors);
        }
        latencies.sort_unstable();
        let pictures = latencies.len() as f64 * body["n"].as_f64().unwrap_or(1.0);
        println!(
            "| {clients} | {:.2} | {:.2} | {:.2} | {refused} | {} | {:.0} |",
            pictures / time,
            percentile(&latencies, 0.5),
            percentile(&latencies, 0.95),
            errors.len(),
            memory(&url)
        );
        for error in errors.iter().take(3) {
            eprintln!("error: {error}");
        }
        honest &= errors.is_empty();
    }
    Ok(honest)
}

/// Numbers with commas between them.
fn list(name: &str, text: &str) -> Result<Vec<usize>, String> {
    let number = |n: &str| {
        n.parse::<usize>()
            .map_err(|_| format!("--{name}: {n} is no number"))
    };
    text.split(',').map(number).collect()
}

/// Asks until the time is over.
fn one_client(url: &str, key: Option<&str>, body: &Value, client: usize, until: Instant) -> Seen {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .proxy(None)
        .timeout_global(Some(Duration::from_secs(900)))
        .build();
    let agent = ureq::Agent::new_with_config(config);
    let mut seen = Seen::default();
    for i in 0.. {
        if Instant::now() >= until {
            break;
        }
        let mut body = body.clone();
        let shape = SHAPES[(client + i) % SHAPES.len()];
        let colour = COLOURS[(client * 5 + i / SHAPES.len()) % COLOURS.len()];
        body["prompt"] = json!(format!("a {colour} {shape}"));
        body["seed"] = json!(client * 100_000 + i);
        let began = Instant::now();
        let mut request = agent
            .post(format!("{url}/v1/images/generations"))
            .header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let answer = request.send(body.to_string()).and_then(|mut response| {
            let text = response
                .body_mut()
                .with_config()
                .limit(1 << 30)
                .read_to_string()?;
            Ok((response.status().as_u16(), text))
        });
        match answer {
            Ok((200, text)) if text.contains("b64_json") => seen.latencies.push(began.elapsed()),
            Ok((429, _)) => {
                seen.refused += 1;
                std::thread::sleep(PAUSE);
            }
            Ok((status, text)) => seen.errors.push(format!("{status}: {text:.200}")),
            Err(error) => seen.errors.push(error.to_string()),
        }
    }
    seen
}

/// Seconds below which that share of the requests took.
fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(at).map_or(f64::NAN, Duration::as_secs_f64)
}

fn metric(url: &str, name: &str) -> Option<f64> {
    let text = ureq::get(format!("{url}/metrics")).call().ok()?;
    let text = text.into_body().read_to_string().ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

fn memory(url: &str) -> f64 {
    metric(url, "process_resident_memory_bytes")
        .map_or(f64::NAN, |bytes| bytes / f64::from(1 << 20))
}
