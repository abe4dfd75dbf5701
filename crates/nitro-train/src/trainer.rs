//! The loop that every run goes through: batch, loss, gradient, step; progress, samples, scores,
//! checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use nitro_data::mds::Damage;
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use rayon::prelude::*;

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::comm::{self, Comm, Single};
use crate::config::RunConfig;
use crate::optimizer::{NamedGradients, add_gradients, named_gradients, step};
use crate::progress::{Line, Log, Meter};
use crate::start::{initial, start};
use crate::store::ParameterStore;

/// Steps with a gradient that is not finite, in a row, that end a run.
const MAX_SKIPPED: u64 = 50;
/// Batches that are made ahead, for each part that is computed at the same time.
const AHEAD: usize = 2;

/// What a training step minimises, and what it reports.
pub struct Losses {
    /// The loss, one element.
    pub total: Tensor<1>,
    /// Named parts for the log.
    pub parts: Vec<(&'static str, f64)>,
}

/// The numbers of a step, `loss` first, and its gradient.
pub struct Measured {
    /// Named numbers for the log.
    pub numbers: Vec<(&'static str, f64)>,
    /// Gradients by parameter name.
    pub gradients: NamedGradients,
}

/// A model with its data and loss.
pub trait Task: Sync {
    /// Some examples of one step, as a thread of its own makes them ahead of time.
    type Batch: Send;

    /// Asks `p` for every parameter of the model.
    fn build(&self, p: &Params<'_>) -> Result<(), TrainError>;

    /// The examples `examples` of the batch of `step`: a function of the seed, the step and the
    /// example's number alone. A resumed run sees what the run it goes on from would have seen, and
    /// several processes together what one would.
    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Self::Batch, TrainError>;

    /// The mean loss of the model with parameters `p` over `batch`.
    fn loss(&self, p: &Params<'_>, batch: Self::Batch) -> Result<Losses, TrainError>;

    /// The numbers of [`loss`](Self::loss) and its gradient.
    fn gradients(
        &self,
        store: &ParameterStore,
        precision: Precision,
        batch: Self::Batch,
    ) -> Result<Measured, TrainError> {
        whole_gradients(self, store, precision, batch)
    }

    /// Writes what the averaged weights make into `dir`, and names the picture, if there is one.
    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError>;

    /// How good the averaged weights are, more being better; `None` for a task without a score.
    fn score(&self, averaged: &TensorMap) -> Result<Option<f64>, TrainError> {
        let _ = averaged;
        Ok(None)
    }

    /// Damaged data that was passed over so far.
    fn damage(&self) -> Vec<Damage> {
        Vec::new()
    }

    /// What data and frozen models the run has, as a text that is another one for others.
    fn fingerprint(&self) -> Result<String, TrainError> {
        Ok(String::new())
    }
}

/// The gradient of a task's loss by one pass through the whole model and back.
pub(crate) fn whole_gradients<T: Task + ?Sized>(
    task: &T,
    store: &ParameterStore,
    precision: Precision,
    batch: T::Batch,
) -> Result<Measured, TrainError> {
    let tensors = store.tracked();
    let device = Device::flex().autodiff();
    let losses = task.loss(&Params::new(&tensors, &device, precision), batch)?;
    let total = f64::from(losses.total.clone().into_scalar::<f32>());
    let mut numbers = vec![("loss", total)];
    numbers.extend(losses.parts);
    Ok(Measured {
        numbers,
        gradients: named_gradients(&tensors, store, losses.total.backward()),
    })
}

/// How a run talks, when it stops, and with whom it shares the work.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// No progress bar.
    pub quiet: bool,
    /// Set from outside (Ctrl-C): the run writes a checkpoint and stops after the step in hand.
    pub stop: Option<&'static AtomicBool>,
    /// The processes of the run.
    pub comm: Arc<dyn Comm>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            quiet: false,
            stop: None,
            comm: Arc::new(Single),
        }
    }
}

/// Trains `task` as `config` says in `dir`, from its newest checkpoint if there is one, and returns
/// the parameters at the end.
pub fn train<T: Task>(
    task: &T,
    config: &RunConfig,
    dir: &Path,
    options: &RunOptions,
) -> Result<ParameterStore, TrainError> {
    let comm = options.comm.as_ref();
    config.check(comm.size())?;
    let common = &config.run;
    let state = start(config, dir, &task.fingerprint()?, comm, || {
        initial(config, |p| task.build(p))
    })?;
    let mut log = Log::open(dir, state.step, common, comm.rank() == 0, options.quiet)?;
    log.say(format!(
        "{}: {:.2}M parameters, {} steps of {} from step {}{}",
        config.task.kind(),
        state.store.trainable_count() as f64 / 1e6,
        common.max_steps,
        common.batch_size,
        state.step,
        match comm.size() {
            1 => String::new(),
            size => format!(", {size} processes"),
        }
    ));
    let first = state.step;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (send, batches) = sync_channel(AHEAD * common.parallel);
        let ended = &ended;
        scope.spawn(move || {
            for step in first..common.max_steps {
                for part in 0..common.parts() {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    let share = comm::share(comm, common.batch_size, part, common.parts());
                    // The run may have panicked.
                    if send.send(task.batch(step, share)).is_err() {
                        return;
                    }
                }
            }
        });
        let mut run = Run {
            task,
            config,
            dir,
            options,
            comm,
            state,
            log: &mut log,
            batches,
            meter: Meter::new(),
            told: BTreeSet::new(),
        };
        let whole = run.go();
        ended.store(true, Ordering::Relaxed);
        while receive(&run.batches).is_some() {}
        run.log.finish(whole.is_ok());
        whole.map(|()| run.state.store)
    })
}

/// The next batch; nothing once the data thread has ended.
///
/// A run waits on a thread of the pool, which the data thread hands work to: blocked, a pool of one
/// thread would never do it. So the wait takes part in the work.
fn receive<B>(batches: &Receiver<B>) -> Option<B> {
    let mut patience = Duration::ZERO;
    loop {
        match batches.recv_timeout(patience) {
            Ok(batch) => return Some(batch),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        patience = match rayon::yield_now() {
            Some(rayon::Yield::Executed) => Duration::ZERO,
            _ => Duration::from_micros(100),
        };
    }
}

/// A run in progress.
struct Run<'a, T: Task> {
    task: &'a T,
    config: &'a RunConfig,
    dir: &'a Path,
    options: &'a RunOptions,
    comm: &'a dyn Comm,
    state: Checkpoint,
    log: &'a mut Log,
    batches: Receiver<Result<T::Batch, TrainError>>,
    meter: Meter,
    /// Damaged shards that were named.
    told: BTreeSet<PathBuf>,
}

impl<T: Task> Run<'_, T> {
    fn go(&mut self) -> Result<(), TrainError> {
        let common = &self.config.run;
        let every = |interval: u64, step: u64| {
            interval > 0 && (step.is_multiple_of(interval) || step == common.max_steps)
        };
        if self.state.step == 0 {
            self.show(common.sample_every > 0, common.score_every > 0)?;
        }
        let mut in_a_row = 0;
        while self.state.step < common.max_steps {
            let (applied, stop) = self.step()?;
            let step = self.state.step;
            in_a_row = if applied { 0 } else { in_a_row + 1 };
            if in_a_row >= MAX_SKIPPED {
                return Err(TrainError::NotFinite {
                    steps: in_a_row,
                    step,
                });
            }
            self.log.position(step);
            if every(common.log_every, step) {
                let lr = self.config.run.learning_rate(step.saturating_sub(1));
                let skipped = step - self.state.updates;
                let mut line = self.meter.take(step, lr, common.batch_size, skipped);
                self.tell_damage(&mut line)?;
                self.log.write(&line)?;
            }
            if every(common.save_every, step) || stop {
                self.save()?;
            }
            self.show(
                every(common.sample_every, step),
                every(common.score_every, step),
            )?;
            if stop && step < common.max_steps {
                return Err(TrainError::Interrupted { step });
            }
        }
        Ok(())
    }

    /// Counts damaged samples in the log's line, and names each damaged shard once.
    fn tell_damage(&mut self, line: &mut Line) -> Result<(), TrainError> {
        let damage = self.damage()?;
        if damage.is_empty() {
            return Ok(());
        }
        line["damaged_samples"] = damage.iter().map(|d| d.samples).sum::<usize>().into();
        for Damage { shard, reason, .. } in damage {
            if self.told.insert(shard.clone()) {
                let shard = shard.display();
                self.log.warn(format!(
                    "damaged shard {shard}: {reason}; other samples take the place of its own"
                ));
            }
        }
        Ok(())
    }

    /// What all processes met. Two of them may have met the same samples of a shard, so the most that
    /// one of them met is what is surely lost.
    fn damage(&self) -> Result<Vec<Damage>, TrainError> {
        let own = self.task.damage();
        if self.comm.size() == 1 {
            return Ok(own);
        }
        let mut all = BTreeMap::<PathBuf, Damage>::new();
        for part in self
            .comm
            .gather(&serde_json::to_vec(&own).unwrap_or_default())?
        {
            let part: Vec<Damage> = serde_json::from_slice(&part).unwrap_or_default();
            for damage in part {
                let known = all.entry(damage.shard.clone()).or_insert(damage.clone());
                known.samples = known.samples.max(damage.samples);
            }
        }
        Ok(all.into_values().collect())
    }

    /// The gradients of some parts of a step, all at the same time.
    fn measure(&self, batches: Vec<T::Batch>) -> Vec<Result<Measured, TrainError>> {
        let (store, precision) = (&self.state.store, self.config.run.precision.into());
        let one = |batch| self.task.gradients(store, precision, batch);
        match batches.len() {
            1 => batches.into_iter().map(one).collect(),
            _ => batches.into_par_iter().map(one).collect(),
        }
    }

    /// One optimiser step; whether it was applied, and whether any process was asked to stop.
    fn step(&mut self) -> Result<(bool, bool), TrainError> {
        let common = &self.config.run;
        let weight = 1.0 / common.parts() as f32;
        let mut gradients = NamedGradients::new();
        let asked = self.options.stop;
        let asked = asked.is_some_and(|flag| flag.load(Ordering::Relaxed));
        let mut names = vec!["stop"];
        let mut numbers = vec![f64::from(u8::from(asked))];
        for _ in 0..common.accumulate {
            let waited = Instant::now();
            let batches: Vec<T::Batch> = (0..common.parallel)
                .map(|_| receive(&self.batches).ok_or(TrainError::DataThread)?)
                .collect::<Result<_, _>>()?;
            self.meter.wait(waited.elapsed());
            // Added up in order, whichever part is done first.
            for measured in self.measure(batches) {
                let measured = measured?;
                if names.len() == 1 {
                    names.extend(measured.numbers.iter().map(|(name, _)| *name));
                    numbers.resize(names.len(), 0.0);
                }
                for (sum, (_, value)) in numbers[1..].iter_mut().zip(&measured.numbers) {
                    *sum += value * f64::from(weight);
                }
                add_gradients(&mut gradients, measured.gradients, weight);
            }
        }
        comm::mean(self.comm, &mut gradients, &mut numbers)?;
        let lr = self.config.run.learning_rate(self.state.step);
        let report = step(
            &mut self.state.store,
            &gradients,
            &common.optimizer,
            lr,
            self.state.updates + 1,
            common.gradient_clip,
            common.ema_rate,
        )?;
        self.state.step += 1;
        if report.applied {
            self.state.updates += 1;
            let mut line: Vec<_> = names.into_iter().zip(numbers.iter().copied()).collect();
            line.remove(0);
            line.push(("grad_norm", report.grad_norm));
            self.meter.add(&line);
        }
        Ok((report.applied, numbers[0] > 0.0))
    }

    /// Writes a checkpoint of weights that all processes have, and waits until it is there.
    fn save(&mut self) -> Result<(), TrainError> {
        comm::agree_on_weights(self.comm, self.state.step, &self.state.store)?;
        if self.comm.rank() == 0 {
            self.state.save(self.dir, self.config.run.keep)?;
        }
        Ok(self.comm.wait()?)
    }

    /// Sample pictures and the score at the present step; the best weights so far are kept.
    fn show(&mut self, pictures: bool, score: bool) -> Result<(), TrainError> {
        if self.comm.rank() != 0 || !(pictures || score) {
            return Ok(());
        }
        let step = self.state.step;
        let averaged = self.state.store.averaged();
        if pictures {
            let dir = self.dir.join("samples");
            std::fs::create_dir_all(&dir).map_err(|source| TrainError::Io {
                path: dir.clone(),
                source,
            })?;
            if let Some(path) = self.task.sample(&averaged, step, &dir)? {
                self.log.picture(step, &path)?;
            }
        }
        if score && let Some(score) = self.task.score(&averaged)? {
            self.log
                .write(&serde_json::json!({ "step": step, "score": score }))?;
            self.state.save_if_best(self.dir, score)?;
        }
        Ok(())
    }
}
