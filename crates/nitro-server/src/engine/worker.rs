//! The engine's thread: batches come together, make a step, and part.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use image::RgbImage;
use nitro_pipeline::{Pipeline, PipelineError, Sample};
use tokio::sync::mpsc;

use super::queue::Turn;
use super::state::{Accepted, Shared, spare};
use super::{Event, Failure, Job};

pub(crate) struct Worker {
    shared: Arc<Shared>,
    pipelines: Arc<Vec<Pipeline>>,
    jobs: HashMap<u64, Running>,
    /// The batch.
    active: Vec<Active>,
}

/// A job some of whose pictures had their turn.
struct Running {
    job: Job,
    events: mpsc::Sender<Event>,
    /// Cost of one picture.
    cost: f64,
    /// Pictures that still wait for their turn.
    waiting: Vec<Option<Sample>>,
    /// Pictures not yet handed over.
    left: usize,
}

/// A picture being denoised.
struct Active {
    job: u64,
    picture: usize,
    sample: Sample,
    previews: usize,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, pipelines: Arc<Vec<Pipeline>>) -> Self {
        Self {
            shared,
            pipelines,
            jobs: HashMap::new(),
            active: Vec::new(),
        }
    }

    pub(crate) fn run(mut self) {
        while let Some(orders) = self.shared.next(self.active.len()) {
            let began = Instant::now();
            orders.left.into_iter().for_each(|id| self.forget(id));
            for turn in orders.turns {
                self.admit(turn);
            }
            let interrupted = orders.interrupted;
            if !interrupted.is_empty() {
                self.interrupt(&interrupted);
            }
            let cost = self.step();
            self.show();
            self.hand_over();
            let left = self.active.iter().map(|a| self.cost_left(a)).sum();
            self.shared.round(cost, began.elapsed(), left);
        }
        for (_, events) in self.shared.abandon() {
            let _ = events.try_send(Event::Failed(Failure::Stopped));
        }
    }

    fn cost_left(&self, active: &Active) -> f64 {
        let share = 1.0 - active.sample.completed() as f64 / active.sample.steps() as f64;
        self.jobs
            .get(&active.job)
            .map_or(0.0, |job| job.cost * share)
    }

    /// Drops what belongs to a job.
    fn forget(&mut self, id: u64) {
        self.jobs.remove(&id);
        self.active.retain(|active| active.job != id);
    }

    /// A job's last word.
    fn end(&mut self, id: u64, last: Option<Event>) {
        self.shared.finish(id);
        if let (Some(job), Some(event)) = (self.jobs.get(&id), last) {
            if let Event::Failed(failure) = &event {
                tracing::error!(job = id, %failure, "a request failed");
                self.shared.metrics.fail(match failure {
                    Failure::Pipeline {
                        bad_request: true, ..
                    } => "bad_request",
                    Failure::Pipeline { .. } => "pipeline",
                    Failure::Crashed => "crash",
                    Failure::Stopped => "stopped",
                });
            }
            let _ = job.events.try_send(event);
        }
        self.forget(id);
    }

    /// Puts a picture whose turn it is into the batch; with a job's first comes its preparation.
    fn admit(&mut self, turn: Turn<Accepted>) {
        if let Some(accepted) = turn.item {
            self.begin(turn.id, accepted);
        }
        let sample = self
            .jobs
            .get_mut(&turn.id)
            .and_then(|job| job.waiting.get_mut(turn.picture)?.take());
        // Jobs that failed or were left are gone.
        if let Some(sample) = sample {
            self.active.push(Active {
                job: turn.id,
                picture: turn.picture,
                sample,
                previews: 0,
            });
        }
    }

    fn begin(&mut self, id: u64, accepted: Accepted) {
        let Accepted {
            job,
            cost,
            events,
            since,
        } = accepted;
        let metrics = &self.shared.metrics;
        metrics.queue_seconds.observe(since.elapsed().as_secs_f64());
        let pipeline = &self.pipelines[job.pipeline];
        // Variants of a model share one.
        let cache = pipeline.prompt_cache();
        let misses = cache.misses();
        let prepared = caught(|| pipeline.prepare(&job.request));
        if let Ok(prepared) = &prepared {
            if cache.misses() > misses {
                metrics.stage("text", prepared.timings.text);
            }
            if job.request.init.is_some() {
                metrics.stage("encode", prepared.timings.encode);
            }
        }
        metrics.cache_hits.set(cache.hits() as i64);
        metrics.cache_misses.set(cache.misses() as i64);
        metrics.cache_bytes.set(cache.bytes() as i64);
        let left = job.request.pictures();
        let mut running = Running {
            job,
            events,
            cost,
            waiting: Vec::new(),
            left,
        };
        match prepared {
            Ok(prepared) => {
                running.tell(Event::Started {
                    truncations: prepared.truncations,
                });
                running.waiting = prepared.samples.into_iter().map(Some).collect();
                self.jobs.insert(id, running);
            }
            Err(failure) => {
                self.jobs.insert(id, running);
                self.end(id, Some(Event::Failed(failure)));
            }
        }
    }

    /// One step of every picture in the batch; returns the work that was done.
    fn step(&mut self) -> f64 {
        let mut failed: Vec<(u64, Failure)> = Vec::new();
        let mut cost = 0.0;
        for members in self.groups(|_, _| true) {
            let began = Instant::now();
            let pipeline = &self.pipelines[members.pipeline];
            let mut all = chosen(&mut self.active, &members.active);
            let result = self::step(&self.shared, pipeline, &mut all);
            if result.is_err() && all.len() > 1 {
                // Whose fault it is shows when each goes alone; nobody has moved yet.
                for sample in &mut all {
                    let alone = &mut [(sample.0, &mut *sample.1)];
                    if let Err(failure) = self::step(&self.shared, pipeline, alone) {
                        failed.push((alone[0].0, failure));
                    }
                }
            } else if let Err(failure) = result {
                failed.extend(all.iter().map(|(job, _)| (*job, failure.clone())));
            }
            drop(all);
            self.shared.metrics.stage("denoise", began.elapsed());
            self.shared
                .metrics
                .batch
                .observe(members.active.len() as f64);
            cost += members
                .active
                .iter()
                .map(|i| self.step_cost(*i))
                .sum::<f64>();
        }
        for (job, failure) in failed {
            self.end(job, Some(Event::Failed(failure)));
        }
        cost
    }

    fn step_cost(&self, active: usize) -> f64 {
        let active = &self.active[active];
        let steps = active.sample.steps().max(1) as f64;
        self.jobs
            .get(&active.job)
            .map_or(0.0, |job| job.cost / steps)
    }

    /// Pictures in the batch that can be computed together: of one model and size.
    fn groups(&self, which: impl Fn(usize, &Active) -> bool) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (i, active) in self.active.iter().enumerate() {
            let Some(running) = self.jobs.get(&active.job) else {
                continue;
            };
            if !which(i, active) {
                continue;
            }
            let (pipeline, side) = (running.job.pipeline, active.sample.side());
            let same = |group: &&mut Group| group.pipeline == pipeline && group.side == side;
            match groups.iter_mut().find(same) {
                Some(group) => group.active.push(i),
                None => groups.push(Group {
                    pipeline,
                    side,
                    active: vec![i],
                }),
            }
        }
        groups
    }

    /// Tells how far everybody is, with previews where they are due.
    fn show(&mut self) {
        let mut due: Vec<bool> = Vec::new();
        let (active, jobs) = (&mut self.active, &self.jobs);
        self.shared.update(|table| {
            for active in active.iter_mut() {
                let (step, steps) = (active.sample.completed(), active.sample.steps());
                let Some(running) = jobs.get(&active.job) else {
                    due.push(false);
                    continue;
                };
                running.hint(Event::Progress {
                    picture: active.picture,
                    step,
                    steps,
                });
                let mut wanted =
                    preview_after(step, steps, running.job.previews) && running.listens();
                if let Some(status) = table.get(active.job) {
                    (status.step, status.steps) = (step, steps);
                    wanted |= status.wants_preview && !active.sample.is_done();
                }
                due.push(wanted);
            }
        });
        if !due.contains(&true) {
            return;
        }
        let groups = self.groups(|i, _| due[i]);
        for (i, image) in self.decode(&groups, Pipeline::previews) {
            // A preview that fails is no reason to end the work; the picture itself will tell.
            let (Ok(image), active) = (image, &mut self.active[i]) else {
                continue;
            };
            let Some(running) = self.jobs.get(&active.job) else {
                continue;
            };
            let (step, steps) = (active.sample.completed(), active.sample.steps());
            let shared = Arc::new(image);
            self.shared.update(|table| {
                if let Some(status) = table.get(active.job) {
                    status.wants_preview = false;
                    status.preview = Some(shared.clone());
                }
            });
            if preview_after(step, steps, running.job.previews) {
                running.hint(Event::Preview {
                    picture: active.picture,
                    index: active.previews,
                    image: Arc::unwrap_or_clone(shared),
                });
                active.previews += 1;
            }
        }
    }

    /// Decodes groups; the result belongs to the picture of that number in the batch.
    fn decode(
        &self,
        groups: &[Group],
        how: fn(&Pipeline, &[&Sample]) -> Result<Vec<RgbImage>, PipelineError>,
    ) -> Vec<(usize, Result<RgbImage, Failure>)> {
        let mut decoded = Vec::new();
        for group in groups {
            let pipeline = &self.pipelines[group.pipeline];
            let of = |which: &[usize]| {
                let samples: Vec<&Sample> = which.iter().map(|i| &self.active[*i].sample).collect();
                caught(|| how(pipeline, &samples))
            };
            let began = Instant::now();
            match of(&group.active) {
                Ok(images) => {
                    let images = images.into_iter().map(Ok);
                    decoded.extend(group.active.iter().copied().zip(images));
                }
                Err(_) => decoded.extend(group.active.iter().map(|i| {
                    let alone =
                        of(&[*i]).and_then(|mut images| images.pop().ok_or(Failure::Crashed));
                    (*i, alone)
                })),
            }
            self.shared.metrics.stage("decode", began.elapsed());
        }
        decoded
    }

    /// Gives finished pictures to those who wait for them.
    fn hand_over(&mut self) {
        let groups = self.groups(|_, active| active.sample.is_done());
        let decoded = self.decode(&groups, Pipeline::pictures);
        self.deliver(decoded);
        self.active.retain(|active| !active.sample.is_done());
    }

    fn deliver(&mut self, decoded: Vec<(usize, Result<RgbImage, Failure>)>) {
        let mut failed: Vec<(u64, Failure)> = Vec::new();
        for (i, image) in decoded {
            let active = &self.active[i];
            let id = active.job;
            let Some(running) = self.jobs.get_mut(&id) else {
                continue;
            };
            let image = match image {
                Ok(image) => image,
                Err(failure) => {
                    failed.push((id, failure));
                    continue;
                }
            };
            self.shared.metrics.pictures.inc();
            running.left -= 1;
            let done = running.job.request.pictures() - running.left;
            if running.left == 0 {
                // Before its last picture: whoever has that and leaves has not cancelled.
                self.shared.finish(id);
            } else {
                self.shared.update(|table| {
                    if let Some(status) = table.get(id) {
                        status.done = done;
                    }
                });
            }
            running.tell(Event::Picture {
                picture: active.picture,
                image,
                steps: active.sample.completed(),
            });
            if running.left == 0 {
                self.jobs.remove(&id);
            }
        }
        // Not sooner: places in the batch change with it.
        for (id, failure) in failed {
            self.end(id, Some(Event::Failed(failure)));
        }
    }

    /// Ends jobs with their pictures as they are expected to become.
    fn interrupt(&mut self, ids: &[u64]) {
        let groups = self.groups(|_, a| ids.contains(&a.job) && a.sample.completed() > 0);
        let decoded = self.decode(&groups, Pipeline::previews);
        self.deliver(decoded);
        for id in ids {
            // Those that wait have no place here yet.
            let waiting = !self.jobs.contains_key(id);
            self.shared.update(|table| {
                if let (true, Some(status)) = (waiting, table.get(*id)) {
                    status.last_word(Event::Interrupted);
                }
            });
            self.end(*id, Some(Event::Interrupted));
        }
    }
}

struct Group {
    pipeline: usize,
    side: usize,
    /// Places in the batch, ascending.
    active: Vec<usize>,
}

impl Running {
    /// Says something that must be heard; there is always room for it.
    fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    fn listens(&self) -> bool {
        spare(&self.events, self.left)
    }

    /// Says something that may be missed.
    fn hint(&self, event: Event) {
        if self.listens() {
            self.tell(event);
        }
    }
}

/// Some of the batch, with their jobs, in ascending order.
fn chosen<'a>(batch: &'a mut [Active], which: &[usize]) -> Vec<(u64, &'a mut Sample)> {
    batch
        .iter_mut()
        .enumerate()
        .filter(|(i, _)| which.contains(i))
        .map(|(_, active)| (active.job, &mut active.sample))
        .collect()
}

/// Whether one of `previews`, spread evenly, comes after this step.
fn preview_after(step: usize, steps: usize, previews: usize) -> bool {
    let passed = |step: usize| step * (previews + 1) / steps.max(1);
    step > 0 && step < steps && passed(step) > passed(step - 1)
}

fn step(
    shared: &Shared,
    pipeline: &Pipeline,
    samples: &mut [(u64, &mut Sample)],
) -> Result<(), Failure> {
    #[cfg(not(test))]
    let _ = shared;
    #[cfg(test)]
    let jobs: Vec<u64> = samples.iter().map(|(job, _)| *job).collect();
    let mut samples: Vec<&mut Sample> = samples.iter_mut().map(|(_, s)| &mut **s).collect();
    caught(|| {
        #[cfg(test)]
        if let Some(hook) = shared.options.before_step {
            hook(&jobs);
        }
        pipeline.step(&mut samples)
    })
}

/// Runs work whose panics end one request, not the engine.
fn caught<T>(work: impl FnOnce() -> Result<T, PipelineError>) -> Result<T, Failure> {
    // What the work leaves half done, its samples and cache entries, is dropped or was not begun.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| Failure::from(&error)),
        Err(_) => Err(Failure::Crashed),
    }
}

#[cfg(test)]
mod tests {
    use super::preview_after;

    #[test]
    fn previews_are_spread_evenly_and_never_the_last_step() {
        let steps = |steps, previews| -> Vec<usize> {
            (1..=steps)
                .filter(|step| preview_after(*step, steps, previews))
                .collect()
        };
        assert_eq!(steps(20, 3), [5, 10, 15]);
        assert_eq!(steps(4, 3), [1, 2, 3]);
        assert_eq!(steps(20, 1), [10]);
        assert!(steps(20, 0).is_empty() && steps(1, 3).is_empty());
    }
}
