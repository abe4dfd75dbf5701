//! What keeps a server standing: keys, limits, a full queue, clients that leave, an orderly end.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nitro_server::{ClientLimits, Keys, ServeError, Server, ServerOptions};
use serde_json::json;
use support::schema::check_response;
use support::{RunError, TestServer, load, long, narrow, options, quick, read_head};

#[test]
fn without_a_key_only_the_outside_is_shown() {
    let mut keys = Keys::default();
    keys.add("alice", "0123456789abcdef").unwrap();
    let server = TestServer::start(ServerOptions { keys, ..options() });
    let body = quick("a ring", 1).to_string();
    let path = "/v1/images/generations";
    let with = |name: &'static str, value: &str| {
        let headers = [("content-type", "application/json"), (name, value)];
        server.request("POST", path, &headers, body.as_bytes())
    };
    let none = with("x-nothing", "1");
    assert_eq!(none.status, 401);
    assert_eq!(none.json()["error"]["code"], "invalid_api_key");
    assert_eq!(none.header("www-authenticate"), Some("Bearer"));
    assert_eq!(with("authorization", "Bearer 0123456789abcdeF").status, 401);
    with("authorization", "Bearer 0123456789abcdef").ok();
    with("x-api-key", "0123456789abcdef").ok();
    // AUTOMATIC1111's clients send user:password; errors come in that server's words.
    assert!(
        server.get("/sdapi/v1/options").json()["detail"]
            .as_str()
            .unwrap()
            .contains("API key")
    );
    let basic = [("authorization", "Basic dXNlcjowMTIzNDU2Nzg5YWJjZGVm")];
    server.request("GET", "/sdapi/v1/options", &basic, b"").ok();
    for open in ["/", "/health", "/health/live", "/metrics", "/openapi.json"] {
        server.get(open).ok();
    }
    assert_eq!(server.metric("nitro_refused_total{reason=\"key\"}"), 3.0);
}

#[test]
fn other_machines_are_not_let_in_by_accident() {
    let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let open = |options: ServerOptions| {
        Server::bind(ServerOptions {
            address: anywhere,
            ..options
        })
    };
    assert!(matches!(open(options()), Err(ServeError::Open { .. })));
    let mut keys = Keys::default();
    keys.add("a", "0123456789abcdef").unwrap();
    assert!(open(ServerOptions { keys, ..options() }).is_ok());
    assert!(
        open(ServerOptions {
            allow_anonymous: true,
            ..options()
        })
        .is_ok()
    );
    let first = Server::bind(options()).unwrap();
    let taken = ServerOptions {
        address: first.address(),
        ..options()
    };
    assert!(matches!(Server::bind(taken), Err(ServeError::Bind { .. })));
}

#[test]
fn web_pages_of_others_are_kept_out() {
    let server = TestServer::start(options());
    let body = quick("a ring", 1).to_string();
    let from = |server: &TestServer, origin: &str| {
        let headers = [("content-type", "application/json"), ("origin", origin)];
        server.request("POST", "/v1/images/generations", &headers, body.as_bytes())
    };
    assert_eq!(from(&server, "http://evil.example").status, 403);
    let own = from(&server, &server.url("")).ok();
    assert_eq!(own.header("access-control-allow-origin"), None);
    let friend = "https://friend.example".to_owned();
    let server = TestServer::start(ServerOptions {
        cors: vec![friend.clone()],
        ..options()
    });
    let answer = from(&server, &friend).ok();
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some(friend.as_str())
    );
    assert_eq!(from(&server, "http://evil.example").status, 403);
}

#[test]
fn a_page_whose_name_was_made_to_mean_this_machine_is_kept_out() {
    // DNS rebinding: origin and host agree, but neither is this machine's own name.
    let status = |server: &TestServer, host: &str| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        write!(
            stream,
            "GET /v1/models HTTP/1.1\r\nhost: {host}\r\norigin: http://{host}\r\n\r\n"
        )
        .unwrap();
        read_head(&mut stream)[9..12].to_owned()
    };
    let server = TestServer::start(options());
    assert_eq!(status(&server, "evil.example:8080"), "403");
    for own in ["localhost:8080", "127.0.0.1:8080", "[::1]:8080"] {
        assert_eq!(status(&server, own), "200", "{own}");
    }
    // A proxy in front of it has a name of its own, which can be listed.
    let server = TestServer::start(ServerOptions {
        cors: vec!["http://pictures.example".to_owned()],
        ..options()
    });
    assert_eq!(status(&server, "pictures.example"), "200");
}

#[test]
fn a_full_queue_refuses_with_a_time_and_a_place() {
    let server = TestServer::start(narrow(1));
    let api = server.get("/openapi.json").ok().json();
    let running = server.send_only("/v1/images/generations", &long());
    server.wait_for("nitro_pictures_running", 1.0);
    let waiting = server.send_only("/v1/images/generations", &long());
    server.wait_for("nitro_pictures_waiting", 1.0);
    let refused = server.generate(&quick("a ring", 1));
    assert_eq!(refused.status, 429, "{}", refused.text());
    let retry: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=600).contains(&retry));
    assert_eq!(refused.header("x-queue-position"), Some("1"));
    let json = refused.json();
    check_response(&api, "post", "/v1/images/generations", 429, &json);
    assert_eq!(json["error"]["type"], "rate_limit_error");
    assert_eq!(json["error"]["queue_position"], 1);

    // Clients that leave stop the work at its next step, and free their places.
    drop((running, waiting));
    server.wait_for("nitro_pictures_waiting", 0.0);
    server.wait_for("nitro_pictures_running", 0.0);
    assert_eq!(server.metric("nitro_cancelled_total"), 2.0);
    assert_eq!(server.metric("nitro_pictures_total"), 0.0);
    server.generate(&quick("a ring", 1)).ok();
}

#[test]
fn a_stream_that_nobody_reads_any_more_ends_too() {
    let server = TestServer::start(options());
    let mut body = long();
    body["stream"] = json!(true);
    body["progress"] = json!(true);
    let mut stream = server.send_only("/v1/images/generations", &body);
    assert!(read_head(&mut stream).contains("200 OK"));
    server.wait_for("nitro_pictures_running", 1.0);
    drop(stream);
    server.wait_for("nitro_pictures_running", 0.0);
    assert_eq!(server.metric("nitro_cancelled_total"), 1.0);
}

#[test]
fn those_who_wait_hear_their_place() {
    let server = TestServer::start(narrow(8));
    let running = server.send_only("/v1/images/generations", &long());
    server.wait_for("nitro_pictures_running", 1.0);
    let first = server.send_only("/v1/images/generations", &long());
    server.wait_for("nitro_pictures_waiting", 1.0);
    let mut body = quick("a ring", 1);
    body["stream"] = json!(true);
    body["progress"] = json!(true);
    let events = std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.generate(&body).ok().events());
        server.wait_for("nitro_pictures_waiting", 2.0);
        drop(first);
        server.wait_for("nitro_pictures_waiting", 1.0);
        drop(running);
        answer.join().unwrap()
    });
    let ahead: Vec<u64> = events
        .iter()
        .filter(|(name, _)| name == "nitro.queued")
        .map(|(_, data)| data["ahead"].as_u64().unwrap())
        .collect();
    assert_eq!(ahead, [1, 0]);
}

#[test]
fn one_client_cannot_take_it_all() {
    let client_limits = ClientLimits {
        requests: Some(1),
        pictures_per_minute: Some(3),
    };
    let server = TestServer::start(ServerOptions {
        client_limits,
        ..options()
    });
    let running = server.send_only("/v1/images/generations", &long());
    server.wait_for("nitro_pictures_running", 1.0);
    let refused = server.generate(&quick("a ring", 1));
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, Some("1"))
    );
    drop(running);
    server.wait_for("nitro_pictures_running", 0.0);
    server.generate(&quick("a ring", 1)).ok();
    let mut two = quick("a ring", 1);
    two["n"] = json!(2);
    let refused = server.generate(&two);
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
}

#[test]
fn bodies_are_bounded() {
    let mut options = options();
    options.limits.body_bytes = 1000;
    options.limits.body_time = Duration::from_millis(300);
    let server = TestServer::start(options);
    let mut body = quick("a ring", 1);
    body["user"] = json!("x".repeat(2000));
    let refused = server.generate(&body);
    assert_eq!(refused.status, 413);
    assert_eq!(refused.json()["error"]["code"], "body_too_large");
    let mut slow = TcpStream::connect(server.address).unwrap();
    write!(
        slow,
        "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: 50\r\n\r\n{{"
    )
    .unwrap();
    assert!(read_head(&mut slow).starts_with("HTTP/1.1 408"));
}

#[test]
fn a_request_ends_at_its_time() {
    let timeout = Duration::from_millis(300);
    let server = TestServer::start(ServerOptions {
        timeout,
        ..options()
    });
    let answer = server.generate(&long());
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert_eq!(answer.json()["error"]["code"], "timeout");
    server.wait_for("nitro_pictures_running", 0.0);
}

#[test]
fn health_metrics_and_request_ids() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let health = server.get("/health").ok().json();
    check_response(&api, "get", "/health", 200, &health);
    assert_eq!(health["status"], "ready");
    let answer = server.request("GET", "/health", &[("x-request-id", "mine-7")], b"");
    assert_eq!(answer.header("x-request-id"), Some("mine-7"));
    let drawn = |sent: &str| {
        let answer = server.request("GET", "/health", &[("x-request-id", sent)], b"");
        answer.header("x-request-id").unwrap().to_owned()
    };
    assert_ne!(drawn("has space"), "has space");
    assert_ne!(drawn("a b"), drawn("a b"));

    let mut body = quick("a ring", 1);
    body["n"] = json!(2);
    server.generate(&body).ok();
    server.generate(&body).ok();
    let text = server.get("/metrics").ok().text();
    assert!(text.trim_end().ends_with("# EOF"), "OpenMetrics ends so");
    let route = "method=\"POST\",route=\"/v1/images/generations\",status=\"200\"";
    for (name, value) in [
        (format!("nitro_http_requests_total{{{route}}}"), 2.0),
        ("nitro_pictures_total".into(), 4.0),
        ("nitro_prompt_cache_hits".into(), 2.0),
        ("nitro_queue_seconds_count".into(), 2.0),
        ("nitro_stage_seconds_count{stage=\"denoise\"}".into(), 4.0),
        ("nitro_batch_pictures_sum".into(), 8.0),
        ("nitro_pictures_waiting".into(), 0.0),
    ] {
        assert_eq!(server.metric(&name), value, "{name}\n{text}");
    }
    if cfg!(target_os = "linux") {
        assert!(server.metric("process_resident_memory_bytes") > 1e6);
    }
}

#[test]
fn an_orderly_end_finishes_what_runs_and_refuses_the_rest() {
    let server = TestServer::start(options());
    let mut body = quick("a ring", 1);
    body["num_inference_steps"] = json!(60);
    let mut kept = TcpStream::connect(server.address).unwrap();
    write!(kept, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(read_head(&mut kept).contains("200 OK"));
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.generate(&body));
        server.wait_for("nitro_pictures_running", 1.0);
        server.stopper.stop();
        assert_eq!(answer.join().unwrap().ok().files().len(), 1);
    });
    let address = server.address;
    server.join().unwrap();
    assert!(
        TcpStream::connect(address).is_err(),
        "nobody listens any more"
    );
}

#[test]
fn what_does_not_finish_in_the_grace_is_told() {
    let grace = Duration::from_millis(100);
    let server = TestServer::start(ServerOptions { grace, ..narrow(4) });
    std::thread::scope(|scope| {
        let running = scope.spawn(|| server.generate(&long()));
        server.wait_for("nitro_pictures_running", 1.0);
        let waiting = scope.spawn(|| server.generate(&long()));
        server.wait_for("nitro_pictures_waiting", 1.0);
        server.stopper.stop();
        for answer in [running.join().unwrap(), waiting.join().unwrap()] {
            assert_eq!(answer.status, 503, "{}", answer.text());
            assert_eq!(answer.json()["error"]["code"], "stopping");
            assert!(answer.header("retry-after").is_some());
        }
    });
    server.join().unwrap();
}

#[test]
fn while_loading_it_says_so_and_a_bad_model_ends_it() {
    let server = Server::bind(options()).unwrap();
    let (address, stopper) = (server.address(), server.stopper());
    let (go, wait) = std::sync::mpsc::channel::<bool>();
    let thread = std::thread::spawn(move || {
        server.run(
            move || match wait.recv().unwrap() {
                true => Ok(load()?),
                false => Err(RunError::Serve(ServeError::NoModel)),
            },
            || {},
        )
    });
    let server = TestServer {
        address,
        stopper,
        thread: Some(thread),
    };
    let health = server.get("/health");
    assert_eq!(
        (health.status, health.json()["status"].as_str()),
        (503, Some("loading"))
    );
    server.get("/health/live").ok();
    let answer = server.generate(&quick("a ring", 1));
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (503, Some("loading"))
    );
    go.send(false).unwrap();
    assert!(matches!(
        server.join(),
        Err(RunError::Serve(ServeError::NoModel))
    ));
}

#[test]
fn ten_times_too_much_load_ends_in_pictures_or_honest_refusals() {
    let server = TestServer::start(narrow(2));
    let until = std::time::Instant::now() + Duration::from_secs(3);
    let (mut pictures, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..30)
            .map(|client| {
                let server = &server;
                scope.spawn(move || {
                    let (mut pictures, mut refused) = (0, 0);
                    while std::time::Instant::now() < until {
                        let answer = server.generate(&quick("a ring", client));
                        match answer.status {
                            200 => pictures += 1,
                            429 if answer.header("retry-after").is_some() => refused += 1,
                            other => panic!("{other}: {}", answer.text()),
                        }
                    }
                    (pictures, refused)
                })
            })
            .collect();
        for client in clients {
            let (p, r) = client.join().unwrap();
            (pictures, refused) = (pictures + p, refused + r);
        }
    });
    assert!(
        pictures > 0 && refused > 0,
        "{pictures} pictures, {refused} refused"
    );
    assert_eq!(server.metric("nitro_pictures_total"), f64::from(pictures));
    server.wait_for("nitro_pictures_running", 0.0);
    server.generate(&quick("a ring", 1)).ok();
}

#[test]
fn rubbish_on_the_wire_hurts_nobody() {
    let server = TestServer::start(options());
    for rubbish in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"GET\r\n\r\n",
        b"POST / HTTP/9\r\n\r\n",
        &[0; 70_000],
    ] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let _ = stream.write_all(rubbish);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    server.get("/health").ok();
}
