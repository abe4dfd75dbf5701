//! Schedules, samplers, guidance and torch-compatible noise: the mathematics of sampling over a
//! denoiser given as a function.
//!
//! This crate knows no model and no tensor library. Latents are `f32` slices of `batch * n` values,
//! sample-major; a denoiser is any function from `(latents, timestep)` to a velocity of equal length.
//!
//! ```
//! use nitro_diffusion::{noise::CpuGenerator, sampler::Euler, schedule::FlowMatchEuler};
//!
//! // A toy flow whose velocity points from the origin: sampling must end at the origin.
//! let schedule = FlowMatchEuler::nitro_e().timetable(20).unwrap();
//! let noise = CpuGenerator::new(0).randn(16);
//! let mut sigma = schedule.sigmas().iter();
//! let sample = Euler::new(&schedule)
//!     .run(
//!         noise,
//!         1,
//!         |x: &[f32], _timestep| {
//!             let sigma = sigma.next().unwrap();
//!             Ok::<_, std::convert::Infallible>(x.iter().map(|x| x / sigma).collect())
//!         },
//!         |_step| std::ops::ControlFlow::Continue(()),
//!     )
//!     .unwrap();
//! assert!(sample.iter().all(|x| x.abs() < 1e-5));
//! ```

pub mod guidance;
pub mod noise;
pub mod sampler;
pub mod schedule;
pub mod sde;

mod error;
pub use error::{Error, Result};
