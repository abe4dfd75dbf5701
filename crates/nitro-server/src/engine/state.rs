//! What the engine's thread shares with those who wait.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use image::RgbImage;
use tokio::sync::mpsc;

use super::queue::{FairQueue, Turn};
use super::{EngineOptions, Event, Job, Refusal, Source};
use crate::client::Client;
use crate::metrics::Metrics;

/// Progress events a slow listener may have outstanding; finished pictures come on top.
const EVENTS: usize = 16;

/// Before anything was measured: seconds per evaluation of the denoiser.
const FIRST_GUESS: f64 = 0.02;

/// The queue and everything about it.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Wakes the engine's thread.
    wake: Condvar,
    pub(crate) options: EngineOptions,
    pub(crate) metrics: Arc<Metrics>,
}

struct State {
    queue: FairQueue<Accepted>,
    /// All jobs that wait or run, by number.
    jobs: BTreeMap<u64, Status>,
    /// Running jobs to be looked at before the next step.
    left: Vec<u64>,
    interrupted: Vec<u64>,
    /// Pictures in the batch, and the work that is left of them.
    running: usize,
    running_cost: f64,
    /// Seconds per unit of cost, averaged over the last steps.
    pace: f64,
    next_id: u64,
    draining: bool,
    stopped: bool,
}

/// A job on its way from the queue to the engine.
pub(crate) struct Accepted {
    pub(crate) job: Job,
    pub(crate) cost: f64,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) since: Instant,
}

/// How a job is going.
pub(crate) struct Status {
    client: Client,
    source: Source,
    pictures: usize,
    events: mpsc::Sender<Event>,
    ahead: Option<usize>,
    since: Instant,
    pub(crate) done: usize,
    pub(crate) step: usize,
    pub(crate) steps: usize,
    pub(crate) preview: Option<Arc<RgbImage>>,
    pub(crate) wants_preview: bool,
}

impl Status {
    /// What the listener hears last.
    pub(crate) fn last_word(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

/// A look at a job.
pub(crate) struct Snapshot {
    pub(crate) pictures: usize,
    pub(crate) done: usize,
    pub(crate) step: usize,
    pub(crate) steps: usize,
    pub(crate) preview: Option<Arc<RgbImage>>,
    pub(crate) since: Instant,
}

/// What the engine does before its next step.
pub(crate) struct Orders {
    pub(crate) turns: Vec<Turn<Accepted>>,
    pub(crate) left: Vec<u64>,
    pub(crate) interrupted: Vec<u64>,
}

impl Shared {
    pub(crate) fn new(options: EngineOptions, metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::new(State {
                queue: FairQueue::new(),
                jobs: BTreeMap::new(),
                left: Vec::new(),
                interrupted: Vec::new(),
                running: 0,
                running_cost: 0.0,
                pace: FIRST_GUESS,
                next_id: 0,
                draining: false,
                stopped: false,
            }),
            wake: Condvar::new(),
            options,
            metrics,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn submit(
        &self,
        job: Job,
        cost: f64,
    ) -> Result<(u64, mpsc::Receiver<Event>), Refusal> {
        let mut state = self.lock();
        if state.draining || state.stopped {
            return Err(Refusal::Stopping);
        }
        let pictures = job.request.pictures();
        let waiting = state.queue.pictures();
        let free = self.options.max_batch.saturating_sub(state.running);
        // A request larger than the whole queue is still served by an idle engine.
        if waiting + pictures > self.options.max_queue + free && waiting + state.running > 0 {
            let ahead = state.queue.waiting().len();
            let seconds = (state.queue.cost() + state.running_cost) * state.pace;
            // Half of the queue will be gone by then; those refused come back at various times.
            let retry = Duration::from_secs_f64((seconds / 2.0).clamp(1.0, 600.0));
            return Err(Refusal::Full { ahead, retry });
        }
        state.next_id += 1;
        let id = state.next_id;
        // Room for every finished picture and the last word, whatever the listener does.
        let (events, receiver) = mpsc::channel(EVENTS + pictures + 1);
        let since = Instant::now();
        let status = Status {
            client: job.client.clone(),
            source: job.source,
            pictures,
            events: events.clone(),
            ahead: None,
            since,
            done: 0,
            step: 0,
            steps: 0,
            preview: None,
            wants_preview: false,
        };
        state.jobs.insert(id, status);
        let accepted = Accepted {
            job,
            cost,
            events,
            since,
        };
        state.queue.push(id, accepted, pictures, cost);
        state.tell_positions();
        self.metrics.waiting.set(state.queue.pictures() as i64);
        self.wake.notify_all();
        Ok((id, receiver))
    }

    /// The one who waited for a job has gone, or has everything.
    pub(crate) fn leave(&self, id: u64) {
        let mut state = self.lock();
        state.queue.remove(id);
        if state.jobs.remove(&id).is_some() {
            state.left.push(id);
            self.metrics.cancelled.inc();
            state.tell_positions();
            self.wake.notify_all();
        }
        self.metrics.waiting.set(state.queue.pictures() as i64);
    }

    /// The engine is done with a job.
    pub(crate) fn finish(&self, id: u64) {
        let mut state = self.lock();
        state.queue.remove(id);
        state.jobs.remove(&id);
    }

    pub(crate) fn interrupt(&self, which: impl Fn(&Client, Source) -> bool) {
        let mut state = self.lock();
        let chosen = state
            .jobs
            .iter()
            .filter(|(_, status)| which(&status.client, status.source))
            .map(|(id, _)| *id)
            .collect::<Vec<_>>();
        state.interrupted.extend(chosen);
        self.wake.notify_all();
    }

    pub(crate) fn snapshot(&self, client: &Client, source: Source) -> Option<Snapshot> {
        let mut state = self.lock();
        let status = state
            .jobs
            .values_mut()
            .find(|status| status.source == source && status.client == *client)?;
        status.wants_preview = true;
        Some(Snapshot {
            pictures: status.pictures,
            done: status.done,
            step: status.step,
            steps: status.steps,
            preview: status.preview.clone(),
            since: status.since,
        })
    }

    pub(crate) fn jobs(&self) -> usize {
        self.lock().jobs.len()
    }

    pub(crate) fn drain(&self) {
        self.lock().draining = true;
    }

    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
    }

    /// Waits for something to do. `None` when the engine is to stop.
    pub(crate) fn next(&self, active: usize) -> Option<Orders> {
        let mut state = self.lock();
        if active == 0 {
            state = self.wait_for_work(state);
        }
        if state.stopped {
            return None;
        }
        let mut turns = Vec::new();
        while active + turns.len() < self.options.max_batch {
            match state.queue.pop() {
                Some(turn) => turns.push(turn),
                None => break,
            }
        }
        if !turns.is_empty() {
            state.tell_positions();
        }
        state.running = active + turns.len();
        self.metrics.running.set(state.running as i64);
        self.metrics.waiting.set(state.queue.pictures() as i64);
        Some(Orders {
            turns,
            left: std::mem::take(&mut state.left),
            interrupted: std::mem::take(&mut state.interrupted),
        })
    }

    fn wait_for_work<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.running = 0;
        state.running_cost = 0.0;
        self.metrics.running.set(0);
        let idle = |state: &mut State| {
            state.queue.pictures() == 0
                && !state.stopped
                && state.left.is_empty()
                && state.interrupted.is_empty()
        };
        state = self
            .wake
            .wait_while(state, idle)
            .unwrap_or_else(PoisonError::into_inner);
        if self.options.max_wait.is_zero() {
            return state;
        }
        let full = self.options.max_batch;
        let lonely =
            |state: &mut State| (1..full).contains(&state.queue.pictures()) && !state.stopped;
        self.wake
            .wait_timeout_while(state, self.options.max_wait, lonely)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// A round of steps that did `cost` work took `time`; `left` is what the batch still has to do.
    pub(crate) fn round(&self, cost: f64, time: Duration, left: f64) {
        let mut state = self.lock();
        state.running_cost = left;
        if cost > 0.0 {
            let pace = time.as_secs_f64() / cost;
            state.pace += 0.1 * (pace - state.pace);
        }
    }

    /// Changes what is known of jobs.
    pub(crate) fn update(&self, change: impl FnOnce(&mut JobTable<'_>)) {
        let mut state = self.lock();
        change(&mut JobTable(&mut state.jobs));
    }

    /// Takes every job out of the books, for their last word.
    pub(crate) fn abandon(&self) -> HashMap<u64, mpsc::Sender<Event>> {
        let mut state = self.lock();
        state.stopped = true;
        state.queue.clear();
        let jobs = std::mem::take(&mut state.jobs);
        jobs.into_iter().map(|(id, s)| (id, s.events)).collect()
    }
}

/// The jobs that somebody still waits for.
pub(crate) struct JobTable<'a>(&'a mut BTreeMap<u64, Status>);

impl JobTable<'_> {
    pub(crate) fn get(&mut self, id: u64) -> Option<&mut Status> {
        self.0.get_mut(&id)
    }
}

impl State {
    /// Tells those who wait how many are before them, where that changed.
    fn tell_positions(&mut self) {
        for (ahead, id) in self.queue.waiting().into_iter().enumerate() {
            if let Some(status) = self.jobs.get_mut(&id)
                && status.ahead != Some(ahead)
                && spare(&status.events, status.pictures)
                && status.events.try_send(Event::Queued { ahead }).is_ok()
            {
                status.ahead = Some(ahead);
            }
        }
    }
}

/// Whether an event that can be missed may be sent without taking the place of one that cannot.
pub(crate) fn spare(events: &mpsc::Sender<Event>, pictures: usize) -> bool {
    events.capacity() > pictures + 1
}
