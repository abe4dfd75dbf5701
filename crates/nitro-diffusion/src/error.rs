/// What can be wrong with a request to this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A schedule without training timesteps or with an unusable shift.
    #[error(
        "flow-matching schedule: {what}; expected num_train_timesteps >= 1 and a finite shift > 0"
    )]
    Config {
        /// The offending setting and its value.
        what: String,
    },
    /// A sampling run without any step.
    #[error(
        "sampling needs at least one step, got {steps}; ask for 1 or more (Nitro-E: 20, distilled: 4)"
    )]
    NoSteps {
        /// The number of steps asked for.
        steps: usize,
    },
    /// A custom sigma outside `[0, 1]`, or one that does not decrease.
    #[error("custom sigmas must decrease strictly within (0, 1]; sigma {index} is {value}")]
    Sigmas {
        /// Position in the list.
        index: usize,
        /// The offending value.
        value: f32,
    },
    /// A timestep that is not in the table it was looked up in.
    #[error(
        "timestep {timestep} is not in the schedule's table of {len} timesteps; use a value taken from it"
    )]
    UnknownTimestep {
        /// The value looked up.
        timestep: f32,
        /// The table's length.
        len: usize,
    },
    /// An image-to-image strength outside `[0, 1]`, or so small that no step is left.
    #[error(
        "strength {strength} with {steps} steps leaves {kept} steps to run; use a strength in (0, 1] of at least 1/steps"
    )]
    Strength {
        /// The strength asked for.
        strength: f64,
        /// Steps of the whole schedule.
        steps: usize,
        /// Steps that would be run.
        kept: usize,
    },
    /// A noise level of stochastic sampling out of range.
    #[error(
        "stochastic sampling: noise level {level}; expected 0 (the ODE) or more, and at most 1 for cps"
    )]
    NoiseLevel {
        /// The level asked for.
        level: f32,
    },
    /// Two slices that must have equal length do not.
    #[error("{what} holds {got} values, expected {expected}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The expected length.
        expected: usize,
    },
    /// A batch size that does not divide the latents.
    #[error(
        "{len} latent values do not divide into a batch of {batch}; expected batch * n values with batch >= 1"
    )]
    Batch {
        /// Number of latent values.
        len: usize,
        /// The batch size given.
        batch: usize,
    },
    /// A random draw with unusable bounds.
    #[error("random draw `{op}`: {what}")]
    Draw {
        /// The operation, by its torch or numpy name.
        op: &'static str,
        /// What was wrong and what is expected.
        what: String,
    },
    /// A saved generator state that cannot be restored.
    #[error("saved {generator} state is unusable: {what}")]
    State {
        /// Which generator.
        generator: &'static str,
        /// What was wrong.
        what: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
