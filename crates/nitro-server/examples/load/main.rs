//! A load generator for image servers that speak OpenAI's Images API.
//!
//! ```text
//! cargo run --release -p nitro -p nitro-server --example load -- \
//!     --url http://127.0.0.1:8080 --clients 1,2,4,8,16,32,64 --seconds 8,10,12,15,20,25,30
//! cargo run --release -p nitro -p nitro-server --example load -- \
//!     --url http://127.0.0.1:8080 --overload 600 --times 10
//! ```
//!
//! The first form is a closed loop: each client asks for one picture after the other. The second is an
//! open loop: requests come at a fixed rate, however the server is doing. Both print Markdown; requests
//! that end in anything but a picture or an honest refusal (429 or 503 with `Retry-After`) are errors and
//! make the exit code 1. `scripts/measure_serving.sh` runs both against `nitro serve`.

mod asking;
mod closed;
mod open;

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use asking::Target;

const USAGE: &str = "\
    --url URL          the server [http://127.0.0.1:8080]\n\
    --key KEY          an API key\n\
    --steps N, --n N, --size PIXELS   what each request asks for [the server's defaults]\n\
    --clients N,N,..   closed loop: numbers of clients [1,2,4,8,16,32,64]\n\
    --seconds S,S,..   closed loop: time for each of them; the last holds for the rest [20]\n\
    --headless 1       closed loop: only the rows of the table\n\
    --overload S       open loop: seconds\n\
    --times X          open loop: requests come X times as fast as the server makes pictures [10]\n\
    --capacity X       open loop: pictures per second [measured first]\n\
    --every S          open loop: seconds between progress lines on standard error [15]";

/// `--NAME VALUE` pairs.
struct Arguments(HashMap<String, String>);

impl Arguments {
    fn read() -> Result<Self, String> {
        let mut found = HashMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word
                .strip_prefix("--")
                .filter(|name| USAGE.contains(&format!("--{name} ")))
                .ok_or(format!("{word} is no option; there are\n{USAGE}"))?;
            let value = words.next().ok_or(format!("--{name} wants a value"))?;
            found.insert(name.to_owned(), value);
        }
        Ok(Self(found))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, String> {
        let Some(text) = self.0.get(name) else {
            return Ok(None);
        };
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(Some(number)),
            _ => Err(format!("--{name} {text}: not a number of 0 or more")),
        }
    }

    /// Numbers with commas between them.
    fn list(&self, name: &str, default: &str) -> Result<Vec<usize>, String> {
        let text = self.0.get(name).map_or(default, String::as_str);
        let number = |n: &str| {
            let refuse = || format!("--{name}: {n} is no whole number above 0");
            n.parse().ok().filter(|n| *n > 0).ok_or_else(refuse)
        };
        text.split(',').map(number).collect()
    }
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
    let mut body = json!({});
    for (name, parameter) in [("steps", "num_inference_steps"), ("n", "n")] {
        if let Some(number) = arguments.number(name)? {
            body[parameter] = json!(number as u64);
        }
    }
    if let Some(side) = arguments.number("size")? {
        body["size"] = json!(format!("{side}x{side}"));
    }
    let url = arguments.0.get("url").map(String::as_str);
    let target = Target {
        url: url.unwrap_or("http://127.0.0.1:8080").to_owned(),
        key: arguments.0.get("key").cloned(),
        body,
    };
    if let Some(seconds) = arguments.number("overload")? {
        return Ok(open::run(
            &target,
            &open::Overload {
                time: Duration::from_secs_f64(seconds),
                times: arguments.number("times")?.unwrap_or(10.0),
                capacity: arguments.number("capacity")?,
                every: Duration::from_secs_f64(arguments.number("every")?.unwrap_or(15.0)),
            },
        ));
    }
    let clients = arguments.list("clients", "1,2,4,8,16,32,64")?;
    let seconds = arguments.list("seconds", "20")?;
    if !arguments.0.contains_key("headless") {
        println!("| clients | images/s | p50 s | p95 s | refused | errors | server MiB |");
        println!("| --- | --- | --- | --- | --- | --- | --- |");
    }
    let mut honest = true;
    for (i, clients) in clients.into_iter().enumerate() {
        let seconds = seconds.get(i).or(seconds.last()).copied().unwrap_or(20);
        let seen = closed::run(&target, clients, Duration::from_secs(seconds as u64));
        println!(
            "| {clients} | {:.2} | {:.2} | {:.2} | {} | {} | {:.0} |",
            seen.rate,
            asking::percentile(&seen.latencies, 0.5),
            asking::percentile(&seen.latencies, 0.95),
            seen.refused,
            seen.errors.len(),
            target.memory()
        );
        asking::show(&seen.errors);
        honest &= seen.errors.is_empty();
    }
    Ok(honest)
}
