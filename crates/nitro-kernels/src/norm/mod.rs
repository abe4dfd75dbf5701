//! Layer norm with AdaLN modulation, and RMS norm, over the last dimension; forward and backward.

mod rows;

pub(crate) use rows::forward_rows;
#[cfg(test)]
mod tests;

use crate::error::{KernelError, check_eq};
use crate::parallel::{RowTasks, part};
use crate::pool::{SharedPtr, par_for};
use crate::simd::Level;

/// Shape of the input of [`layer_norm_modulate_forward`]: `[batch, tokens, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormShape {
    /// Samples; each has its own scale and shift.
    pub batch: usize,
    /// Rows per sample.
    pub tokens: usize,
    /// Length of the normalised dimension.
    pub channels: usize,
}

/// The affine parameters of a layer norm and of the modulation after it; each may be absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerNormParams<'a> {
    /// `[channels]`, 1 if absent.
    pub weight: Option<&'a [f32]>,
    /// `[channels]`, 0 if absent.
    pub bias: Option<&'a [f32]>,
    /// `[batch, channels]`, 0 if absent.
    pub scale: Option<&'a [f32]>,
    /// `[batch, channels]`, 0 if absent.
    pub shift: Option<&'a [f32]>,
}

/// Where [`layer_norm_modulate_backward`] writes the parameters' gradients; absent ones are not
/// computed. A gradient may be asked for whether or not its parameter was present.
#[derive(Debug, Default)]
pub struct LayerNormParamGrads<'a> {
    /// `[channels]`
    pub weight: Option<&'a mut [f32]>,
    /// `[channels]`
    pub bias: Option<&'a mut [f32]>,
    /// `[batch, channels]`
    pub scale: Option<&'a mut [f32]>,
    /// `[batch, channels]`
    pub shift: Option<&'a mut [f32]>,
}

fn check_optional(
    what: &'static str,
    expected: usize,
    slice: Option<&[f32]>,
) -> Result<(), KernelError> {
    slice.map_or(Ok(()), |slice| check_eq(what, expected, slice.len()))
}

impl LayerNormParams<'_> {
    fn check(&self, shape: LayerNormShape) -> Result<(), KernelError> {
        if shape.channels == 0 {
            return Err(KernelError::Unsupported {
                what: "norm channels",
                value: 0,
                help: "give the length of the normalised dimension",
            });
        }
        let modulation = shape.batch * shape.channels;
        check_optional("layer norm weight length", shape.channels, self.weight)?;
        check_optional("layer norm bias length", shape.channels, self.bias)?;
        check_optional("layer norm scale length", modulation, self.scale)?;
        check_optional("layer norm shift length", modulation, self.shift)
    }

    /// Folds the four parameters of one sample into `norm(x) * gain + offset`.
    fn fold(&self, sample: usize, gain: &mut [f32], offset: &mut [f32]) {
        let channels = gain.len();
        let of_sample =
            |all: Option<&'_ [f32]>, c: usize| all.map_or(0.0, |a| a[sample * channels + c]);
        for c in 0..channels {
            let modulation = 1.0 + of_sample(self.scale, c);
            gain[c] = self.weight.map_or(1.0, |w| w[c]) * modulation;
            offset[c] = self.bias.map_or(0.0, |b| b[c]) * modulation + of_sample(self.shift, c);
        }
    }
}

/// `y = (norm(x) * weight + bias) * (1 + scale) + shift`, where `norm` gives each row mean 0 and
/// variance 1 (biased variance, `eps` added to it).
///
/// `x` and `y` are `[batch, tokens, channels]`. `mean` and `rstd` (`[batch * tokens]`) receive the
/// rows' means and reciprocal deviations, for the backward pass.
///
/// # Errors
/// A slice whose length does not follow from `shape`.
pub fn layer_norm_modulate_forward(
    shape: LayerNormShape,
    x: &[f32],
    params: LayerNormParams<'_>,
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) -> Result<(), KernelError> {
    check_eq(
        "layer norm mean length",
        shape.batch * shape.tokens,
        mean.len(),
    )?;
    forward(Level::active(), shape, x, params, eps, y, Some(mean), rstd)
}

/// Gradients of [`layer_norm_modulate_forward`].
///
/// `dy`, `x` and `dx` are `[batch, tokens, channels]`; `mean` and `rstd` come from the forward pass.
/// `dx` and the gradients asked for are overwritten.
///
/// # Errors
/// A slice whose length does not follow from `shape`.
pub fn layer_norm_modulate_backward(
    shape: LayerNormShape,
    dy: &[f32],
    x: &[f32],
    params: LayerNormParams<'_>,
    mean: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    grads: LayerNormParamGrads<'_>,
) -> Result<(), KernelError> {
    check_eq(
        "layer norm mean length",
        shape.batch * shape.tokens,
        mean.len(),
    )?;
    backward(
        Level::active(),
        shape,
        dy,
        x,
        params,
        Some(mean),
        rstd,
        dx,
        grads,
    )
}

/// `y = x / sqrt(mean(x^2) + eps) * weight + bias` over rows of `channels`.
///
/// `x` and `y` are `[rows, channels]`; `weight` and `bias` are `[channels]`; `rstd` (`[rows]`)
/// receives the reciprocal root mean squares, for the backward pass.
///
/// # Errors
/// A slice whose length does not follow from `rstd.len()` rows of `channels`.
pub fn rms_norm_forward(
    channels: usize,
    x: &[f32],
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    rstd: &mut [f32],
) -> Result<(), KernelError> {
    let shape = LayerNormShape {
        batch: 1,
        tokens: rstd.len(),
        channels,
    };
    let params = LayerNormParams {
        weight,
        bias,
        ..Default::default()
    };
    forward(Level::active(), shape, x, params, eps, y, None, rstd)
}

/// Gradients of [`rms_norm_forward`]; `dweight` and `dbias` (`[channels]`) if asked for.
///
/// # Errors
/// A slice whose length does not follow from `rstd.len()` rows of `channels`.
pub fn rms_norm_backward(
    channels: usize,
    dy: &[f32],
    x: &[f32],
    weight: Option<&[f32]>,
    rstd: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    let shape = LayerNormShape {
        batch: 1,
        tokens: rstd.len(),
        channels,
    };
    let params = LayerNormParams {
        weight,
        ..Default::default()
    };
    let grads = LayerNormParamGrads {
        weight: dweight,
        bias: dbias,
        ..Default::default()
    };
    backward(Level::active(), shape, dy, x, params, None, rstd, dx, grads)
}

fn forward(
    level: Level,
    shape: LayerNormShape,
    x: &[f32],
    params: LayerNormParams<'_>,
    eps: f32,
    y: &mut [f32],
    mean: Option<&mut [f32]>,
    rstd: &mut [f32],
) -> Result<(), KernelError> {
    let LayerNormShape {
        batch,
        tokens,
        channels,
    } = shape;
    check_eq("norm input length", batch * tokens * channels, x.len())?;
    check_eq("norm output length", x.len(), y.len())?;
    check_eq("norm rstd length", batch * tokens, rstd.len())?;
    params.check(shape)?;
    let tasks = RowTasks::new(batch, tokens, channels);
    let y = SharedPtr(y.as_mut_ptr());
    let rstd = SharedPtr(rstd.as_mut_ptr());
    let mean = mean.map(|mean| SharedPtr(mean.as_mut_ptr()));
    par_for(tasks.count(), |task| {
        let rows = tasks.get(task);
        let mut gain = vec![0.0; channels];
        let mut offset = vec![0.0; channels];
        params.fold(rows.sample, &mut gain, &mut offset);
        let span = rows.elements(channels);
        // SAFETY: lengths were checked above, and tasks have disjoint rows.
        let (y, mean, rstd) = unsafe {
            (
                part(y, span.clone()),
                mean.map_or(&mut [][..], |mean| part(mean, rows.rows.clone())),
                part(rstd, rows.rows.clone()),
            )
        };
        rows::forward_rows(level, &x[span], &gain, &offset, eps, y, mean, rstd);
    });
    Ok(())
}

fn backward(
    level: Level,
    shape: LayerNormShape,
    dy: &[f32],
    x: &[f32],
    params: LayerNormParams<'_>,
    mean: Option<&[f32]>,
    rstd: &[f32],
    dx: &mut [f32],
    grads: LayerNormParamGrads<'_>,
) -> Result<(), KernelError> {
    let LayerNormShape {
        batch,
        tokens,
        channels,
    } = shape;
    check_eq("norm input length", batch * tokens * channels, x.len())?;
    check_eq("norm output gradient length", x.len(), dy.len())?;
    check_eq("norm input gradient length", x.len(), dx.len())?;
    check_eq("norm rstd length", batch * tokens, rstd.len())?;
    params.check(shape)?;
    let LayerNormParamGrads {
        weight: dweight,
        bias: dbias,
        scale: dscale,
        shift: dshift,
    } = grads;
    check_optional(
        "layer norm weight gradient length",
        channels,
        dweight.as_deref(),
    )?;
    check_optional(
        "layer norm bias gradient length",
        channels,
        dbias.as_deref(),
    )?;
    check_optional(
        "layer norm scale gradient length",
        batch * channels,
        dscale.as_deref(),
    )?;
    check_optional(
        "layer norm shift gradient length",
        batch * channels,
        dshift.as_deref(),
    )?;

    let tasks = RowTasks::new(batch, tokens, channels);
    // Per task, two rows: sums of dy * norm(x), and of dy.
    let mut partial = vec![0.0; tasks.count() * 2 * channels];
    let dx = SharedPtr(dx.as_mut_ptr());
    let partial_ptr = SharedPtr(partial.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let rows = tasks.get(task);
        let mut gain = vec![0.0; channels];
        let mut offset = vec![0.0; channels];
        params.fold(rows.sample, &mut gain, &mut offset);
        let span = rows.elements(channels);
        // SAFETY: lengths were checked above, and tasks have disjoint rows and partial sums.
        let (dx, sums) = unsafe {
            (
                part(dx, span.clone()),
                part(partial_ptr, task * 2 * channels..(task + 1) * 2 * channels),
            )
        };
        let (dgain, doffset) = sums.split_at_mut(channels);
        let mean = mean.map_or(&[][..], |mean| &mean[rows.rows.clone()]);
        let rstd = &rstd[rows.rows];
        rows::backward_rows(
            level,
            &dy[span.clone()],
            &x[span],
            &gain,
            mean,
            rstd,
            dx,
            dgain,
            doffset,
        );
    });

    // In task order, so that the result is the same for any number of threads.
    let mut dgain = vec![0.0; batch * channels];
    let mut doffset = vec![0.0; batch * channels];
    for task in 0..tasks.count() {
        let sample = tasks.sample(task) * channels..(tasks.sample(task) + 1) * channels;
        let (g, o) = partial[task * 2 * channels..][..2 * channels].split_at(channels);
        dgain[sample.clone()]
            .iter_mut()
            .zip(g)
            .for_each(|(sum, g)| *sum += g);
        doffset[sample]
            .iter_mut()
            .zip(o)
            .for_each(|(sum, o)| *sum += o);
    }
    let fold_samples = |out: &mut [f32], of: &[f32]| {
        out.fill(0.0);
        for sample in 0..batch {
            for (c, out) in out.iter_mut().enumerate() {
                let i = sample * channels + c;
                *out += of[i] * (1.0 + params.scale.map_or(0.0, |scale| scale[i]));
            }
        }
    };
    if let Some(dweight) = dweight {
        fold_samples(dweight, &dgain);
    }
    if let Some(dbias) = dbias {
        fold_samples(dbias, &doffset);
    }
    if let Some(dscale) = dscale {
        for (i, dscale) in dscale.iter_mut().enumerate() {
            let c = i % channels;
            *dscale = dgain[i] * params.weight.map_or(1.0, |w| w[c])
                + doffset[i] * params.bias.map_or(0.0, |b| b[c]);
        }
    }
    if let Some(dshift) = dshift {
        dshift.copy_from_slice(&doffset);
    }
    Ok(())
}
