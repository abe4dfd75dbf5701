//! Classifier-free guidance: from a conditional and an unconditional velocity to a guided one.

use crate::{Error, Result};

/// `uncond + scale * (cond - uncond)`, element by element.
pub fn combine(uncond: &[f32], cond: &[f32], scale: f32) -> Result<Vec<f32>> {
    if uncond.len() != cond.len() {
        return Err(Error::Length {
            what: "unconditional velocity",
            got: uncond.len(),
            expected: cond.len(),
        });
    }
    Ok(uncond
        .iter()
        .zip(cond)
        .map(|(uncond, cond)| uncond + scale * (cond - uncond))
        .collect())
}

/// Whether a guidance scale asks for guidance at all: only above 1, as in diffusers.
///
/// Nitro-E uses 4.5, its distilled version 0 (none).
pub fn is_active(scale: f32) -> bool {
    scale > 1.0
}

/// Wraps a denoiser of doubled batches into a guided denoiser of single ones.
///
/// `denoise` receives the latents twice, `[2 * B * n]`: the first half belongs with the negative
/// prompts' embeddings, the second with the prompts'. It returns both velocities in that order.
/// A velocity of another length is handed on for the sampler to report.
pub fn classifier_free<E>(
    scale: f32,
    mut denoise: impl FnMut(&[f32], f32) -> Result<Vec<f32>, E>,
) -> impl FnMut(&[f32], f32) -> Result<Vec<f32>, E> {
    move |latents, timestep| {
        let doubled = [latents, latents].concat();
        let mut velocity = denoise(&doubled, timestep)?;
        if velocity.len() != doubled.len() {
            return Ok(velocity);
        }
        let (uncond, cond) = velocity.split_at_mut(latents.len());
        for (uncond, cond) in uncond.iter_mut().zip(cond) {
            *uncond += scale * (*cond - *uncond);
        }
        velocity.truncate(latents.len());
        Ok(velocity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_moves_from_unconditional_through_conditional() {
        let (uncond, cond) = ([1.0, -2.0], [3.0, 0.0]);
        assert_eq!(combine(&uncond, &cond, 0.0).unwrap(), uncond);
        assert_eq!(combine(&uncond, &cond, 1.0).unwrap(), cond);
        assert_eq!(combine(&uncond, &cond, 4.5).unwrap(), [10.0, 7.0]);
        assert!(combine(&uncond, &cond[..1], 4.5).is_err());
        assert!(is_active(4.5) && !is_active(1.0) && !is_active(0.0));
    }

    #[test]
    fn the_wrapped_denoiser_sees_negatives_first() {
        let mut guided = classifier_free(3.0, |latents: &[f32], timestep| {
            assert_eq!((latents, timestep), (&[5.0, 6.0, 5.0, 6.0][..], 250.0));
            Ok::<_, ()>(vec![1.0, 1.0, 2.0, 0.0])
        });
        assert_eq!(guided(&[5.0, 6.0], 250.0), Ok(vec![4.0, -2.0]));
    }
}
