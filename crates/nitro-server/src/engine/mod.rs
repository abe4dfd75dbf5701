//! The one place where pictures are made: a bounded queue and a thread that denoises the pictures of
//! many requests together, step by step.

mod queue;
mod state;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use image::RgbImage;
use nitro_pipeline::{Pipeline, PipelineError, Plan, Request, Truncation};
use tokio::sync::mpsc;

use self::state::Shared;
use self::worker::Worker;
use crate::client::Client;
use crate::metrics::Metrics;

pub(crate) use self::state::Snapshot;

/// How the engine shares itself out.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Most pictures denoised together. 1 switches batching off.
    pub max_batch: usize,
    /// How long an idle engine waits for company of the first request. Requests that come later join
    /// between two steps anyway.
    pub max_wait: Duration,
    /// Most pictures that wait.
    pub max_queue: usize,
    /// Called before every pass of the denoiser, to break it in tests.
    #[cfg(test)]
    pub(crate) before_step: Option<fn(&[u64])>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_batch: 8,
            max_wait: Duration::ZERO,
            max_queue: 64,
            #[cfg(test)]
            before_step: None,
        }
    }
}

/// Which API a job came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    OpenAi,
    A1111,
}

/// A request for pictures.
#[derive(Debug)]
pub(crate) struct Job {
    /// Which of the engine's pipelines.
    pub(crate) pipeline: usize,
    /// One prompt, any number of pictures.
    pub(crate) request: Request,
    /// Previews of each picture on its way.
    pub(crate) previews: usize,
    pub(crate) client: Client,
    pub(crate) source: Source,
}

/// What the one who waits for a job hears.
#[derive(Debug)]
pub(crate) enum Event {
    /// Requests before this one in the queue.
    Queued { ahead: usize },
    /// Work has begun. Prompts that did not fit are named.
    Started { truncations: Vec<Truncation> },
    /// A picture has made a step. May be left out where the listener is slow.
    Progress {
        picture: usize,
        step: usize,
        steps: usize,
    },
    /// What a picture is expected to become; left out where the listener is slow.
    Preview {
        picture: usize,
        index: usize,
        image: RgbImage,
    },
    /// A finished picture; `steps` are fewer than planned where the job was interrupted.
    Picture {
        picture: usize,
        image: RgbImage,
        steps: usize,
    },
    /// An interrupted job gives no further picture.
    Interrupted,
    /// The job gives no further picture.
    Failed(Failure),
}

/// Why an accepted job gave no picture.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The pipeline refused or failed; whether it was the request's fault.
    #[error("{message}")]
    Pipeline { message: String, bad_request: bool },
    /// A bug.
    #[error("the engine failed on this request; others are not affected")]
    Crashed,
    /// The server is being stopped.
    #[error("the server stopped before the request was done")]
    Stopped,
}

impl From<&PipelineError> for Failure {
    fn from(error: &PipelineError) -> Self {
        Self::Pipeline {
            message: error.to_string(),
            bad_request: error.is_bad_request(),
        }
    }
}

/// Why a job was not accepted.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The model cannot do it.
    Impossible(PipelineError),
    /// The queue is full.
    Full { ahead: usize, retry: Duration },
    /// The server is being stopped.
    Stopping,
}

/// An accepted job, seen by the one who waits for it. Dropping it cancels the job.
pub(crate) struct Ticket {
    pub(crate) id: u64,
    /// Steps, guidance and size that were settled on.
    pub(crate) plan: Plan,
    pub(crate) events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.leave(self.id);
    }
}

/// The engine. Dropping it stops the thread.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    pipelines: Arc<Vec<Pipeline>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts the engine's thread. There must be a pipeline.
    pub(crate) fn start(
        pipelines: Vec<Pipeline>,
        options: EngineOptions,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let pipelines = Arc::new(pipelines);
        let shared = Arc::new(Shared::new(options, metrics));
        let worker = Worker::new(shared.clone(), pipelines.clone());
        let thread = std::thread::Builder::new()
            .name("nitro-engine".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            shared,
            pipelines,
            thread: Some(thread),
        })
    }

    /// The models, the default one first.
    pub(crate) fn pipelines(&self) -> &[Pipeline] {
        &self.pipelines
    }

    /// Queues a job, if it is possible and there is room.
    pub(crate) fn submit(&self, job: Job) -> Result<Ticket, Refusal> {
        let pipeline = &self.pipelines[job.pipeline];
        let plan = pipeline.plan(&job.request).map_err(Refusal::Impossible)?;
        let own = pipeline.variant().resolution.max(1) as f64;
        // Attention aside, work grows with the pixels.
        let size = (plan.side() as f64 / own).powi(2);
        let cost = plan.evaluations() as f64 * size;
        let (id, events) = self.shared.submit(job, cost)?;
        Ok(Ticket {
            id,
            plan,
            events,
            shared: self.shared.clone(),
        })
    }

    /// Ends jobs with the pictures as they are now.
    pub(crate) fn interrupt(&self, which: impl Fn(&Client, Source) -> bool) {
        self.shared.interrupt(which);
    }

    /// How a client's job of one API is going, the one begun first; asks for a preview of it.
    pub(crate) fn snapshot(&self, client: &Client, source: Source) -> Option<Snapshot> {
        self.shared.snapshot(client, source)
    }

    /// Jobs that wait or run.
    pub(crate) fn jobs(&self) -> usize {
        self.shared.jobs()
    }

    /// Accepts nothing more; what is accepted goes on.
    pub(crate) fn drain(&self) {
        self.shared.drain();
    }

    /// Tells everybody who still waits that the server stops.
    pub(crate) fn stop(&self) {
        self.shared.stop();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr};
    use std::path::Path;

    fn engine(before_step: Option<fn(&[u64])>) -> (Engine, Arc<Metrics>) {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline/model");
        let pipeline = Pipeline::from_pretrained(model).unwrap();
        let metrics = Arc::new(Metrics::new());
        let options = EngineOptions {
            // The first waits for the others, so that all are of one batch.
            max_wait: Duration::from_secs(60),
            max_batch: 3,
            before_step,
            ..EngineOptions::default()
        };
        let engine = Engine::start(vec![pipeline], options, metrics.clone()).unwrap();
        (engine, metrics)
    }

    fn job(seed: u64) -> Job {
        Job {
            pipeline: 0,
            request: Request::new("a red fox").seed(seed).steps(3),
            previews: 0,
            client: Client::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            source: Source::OpenAi,
        }
    }

    /// The last event of a job.
    fn last(mut ticket: Ticket) -> Event {
        let mut last = None;
        while let Some(event) = ticket.events.blocking_recv() {
            let end = matches!(event, Event::Picture { .. } | Event::Failed(_));
            last = Some(event);
            if end {
                break;
            }
        }
        last.unwrap()
    }

    #[test]
    fn a_crash_of_one_request_does_not_touch_the_others() {
        // The second job breaks whatever batch it is in.
        let (engine, metrics) = engine(Some(|jobs| assert!(!jobs.contains(&2), "for the test")));
        let tickets: Vec<Ticket> = (1..=3)
            .map(|seed| engine.submit(job(seed)).unwrap())
            .collect();
        let mut ends = tickets.into_iter().map(last);
        let (first, second, third) = (ends.next(), ends.next(), ends.next());
        assert!(matches!(second, Some(Event::Failed(Failure::Crashed))));
        let pipeline = &engine.pipelines()[0];
        for (seed, end) in [(1, first), (3, third)] {
            let Some(Event::Picture { image, .. }) = end else {
                panic!("{end:?}");
            };
            let alone = pipeline.generate(&job(seed).request).unwrap();
            assert!(image == alone.images[0].image, "seed {seed}");
        }
        assert_eq!(metrics.pictures.get(), 2);
    }

    #[test]
    fn a_stopped_engine_says_so_to_everybody() {
        let (engine, _) = engine(None);
        let ticket = engine.submit(job(1)).unwrap();
        engine.stop();
        assert!(matches!(last(ticket), Event::Failed(Failure::Stopped)));
        assert!(matches!(engine.submit(job(2)), Err(Refusal::Stopping)));
        assert_eq!(engine.jobs(), 0);
    }
}
