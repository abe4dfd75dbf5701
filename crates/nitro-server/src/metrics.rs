//! What the server counts, for Prometheus.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Of one answered HTTP request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub(crate) method: String,
    /// The route's pattern, not the path: clients choose paths.
    pub(crate) route: String,
    pub(crate) status: u16,
}

/// A label with one name: a stage, a reason, a route.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct RouteLabel {
    pub(crate) route: String,
}

/// Which part of the work.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct StageLabel {
    pub(crate) stage: &'static str,
}

/// Why there is no picture.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    pub(crate) reason: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics. Clones share the numbers.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) requests: Family<RequestLabels, Counter>,
    pub(crate) request_seconds: Histograms<RouteLabel>,
    pub(crate) connections: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) running: Gauge,
    pub(crate) queue_seconds: Histogram,
    pub(crate) batch: Histogram,
    pub(crate) stages: Histograms<StageLabel>,
    pub(crate) pictures: Counter,
    pub(crate) refused: Family<ReasonLabel, Counter>,
    pub(crate) failed: Family<ReasonLabel, Counter>,
    pub(crate) cancelled: Counter,
    pub(crate) cache_hits: Gauge,
    pub(crate) cache_misses: Gauge,
    pub(crate) cache_bytes: Gauge,
    memory: Gauge,
}

/// 5 ms to 10 min: a step of the miniature, a picture of the real model on a small machine in a queue.
fn seconds() -> Histogram {
    Histogram::new([
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
        320.0, 600.0,
    ])
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let metrics = Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(seconds),
            connections: Gauge::default(),
            waiting: Gauge::default(),
            running: Gauge::default(),
            queue_seconds: seconds(),
            batch: Histogram::new([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]),
            stages: Family::new_with_constructor(seconds),
            pictures: Counter::default(),
            refused: Family::default(),
            failed: Family::default(),
            cancelled: Counter::default(),
            cache_hits: Gauge::default(),
            cache_misses: Gauge::default(),
            cache_bytes: Gauge::default(),
            memory: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register(
            "nitro_http_requests",
            "Answered HTTP requests",
            metrics.requests.clone(),
        );
        registry.register_with_unit(
            "nitro_http_request",
            "Time from a request's head to its answer's head",
            Unit::Seconds,
            metrics.request_seconds.clone(),
        );
        registry.register(
            "nitro_connections",
            "Open connections",
            metrics.connections.clone(),
        );
        registry.register(
            "nitro_pictures_waiting",
            "Pictures in the queue",
            metrics.waiting.clone(),
        );
        registry.register(
            "nitro_pictures_running",
            "Pictures being denoised",
            metrics.running.clone(),
        );
        registry.register_with_unit(
            "nitro_queue",
            "Time a request waits until its first picture is begun",
            Unit::Seconds,
            metrics.queue_seconds.clone(),
        );
        registry.register(
            "nitro_batch_pictures",
            "Pictures that one step was made for",
            metrics.batch.clone(),
        );
        registry.register_with_unit(
            "nitro_stage",
            "Time of one pass: text encoder, image encoder, one denoising step, decoder",
            Unit::Seconds,
            metrics.stages.clone(),
        );
        registry.register(
            "nitro_pictures",
            "Finished pictures",
            metrics.pictures.clone(),
        );
        registry.register(
            "nitro_refused",
            "Requests refused, by reason",
            metrics.refused.clone(),
        );
        registry.register(
            "nitro_failed",
            "Accepted requests that failed, by reason",
            metrics.failed.clone(),
        );
        registry.register(
            "nitro_cancelled",
            "Accepted requests whose client left or cancelled",
            metrics.cancelled.clone(),
        );
        registry.register(
            "nitro_prompt_cache_hits",
            "Texts whose encoding was known",
            metrics.cache_hits.clone(),
        );
        registry.register(
            "nitro_prompt_cache_misses",
            "Texts that were encoded",
            metrics.cache_misses.clone(),
        );
        registry.register_with_unit(
            "nitro_prompt_cache",
            "Encoded texts in memory",
            Unit::Bytes,
            metrics.cache_bytes.clone(),
        );
        registry.register_with_unit(
            "process_resident_memory",
            "Resident memory",
            Unit::Bytes,
            metrics.memory.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }

    /// The time one pass of a stage took.
    pub(crate) fn stage(&self, stage: &'static str, time: Duration) {
        self.stages
            .get_or_create(&StageLabel { stage })
            .observe(time.as_secs_f64());
    }

    pub(crate) fn refuse(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn fail(&self, reason: &'static str) {
        self.failed.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Everything in the OpenMetrics text format.
    pub(crate) fn render(&self) -> String {
        if let Some(bytes) = resident_memory() {
            self.memory.set(bytes);
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// Resident memory of this process in bytes, where the system tells it as Linux does.
pub(crate) fn resident_memory() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
