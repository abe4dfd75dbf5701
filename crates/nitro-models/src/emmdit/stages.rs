//! The forward pass in stages: what comes before the blocks, each block, and what comes after.
//!
//! Training with little memory keeps only what passes between the stages and computes each stage again
//! for its gradient.

use burn::tensor::Tensor;
use nitro_ops::layer_norm_modulate;

use super::block::EPS;
use super::{Emmdit, project_by};
use crate::InputError;

/// What passes from one stage to the next.
#[derive(Clone, Debug)]
pub struct EmmditState {
    /// Image tokens, `[B, T, D]`; compressed ones in the middle group.
    pub image: Tensor<3>,
    /// Text tokens, `[B, L, D]`.
    pub text: Tensor<3>,
    /// The modulation that all blocks share, `[B, 6, D]`.
    pub time: Tensor<3>,
    /// The first group's image tokens, while the middle group works on compressed ones.
    pub skip: Option<Tensor<3>>,
}

/// Shows an intermediate result by name.
type See<'a> = &'a mut dyn FnMut(&dyn Fn() -> String, &Tensor<3>);

impl Emmdit {
    /// Everything before the first block; arguments as of [`forward`](Emmdit::forward).
    pub fn begin(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
    ) -> Result<EmmditState, InputError> {
        self.check_inputs(&latents, &text, times)?;
        let grid = self.tokens_of(&latents);
        Ok(self.begin_observed(latents, text, times, grid, &mut |_, _| {}))
    }

    /// The state after block `index`, and after what stands before that block: token compression,
    /// or reconstruction and position reinforcement. For latents of the configured size.
    pub fn advance(&self, index: usize, state: EmmditState) -> EmmditState {
        self.advance_observed(index, state, [self.config.grid(); 2], &mut |_, _| {})
    }

    /// The velocity as tokens, `[B, T, patch * patch * out_channels]`, from the last state.
    pub fn end(&self, state: EmmditState) -> Tensor<3> {
        self.proj_out
            .forward(layer_norm_modulate(state.image, None, None, EPS))
    }

    /// Each REPA projector's view of image tokens `[B, T, D]`, of the state after the first group.
    pub fn project(&self, image: &Tensor<3>) -> Vec<Tensor<3>> {
        let projectors = self.projectors.iter();
        projectors.map(|layers| project_by(layers, image)).collect()
    }

    pub(super) fn begin_observed(
        &self,
        latents: Tensor<4>,
        text: Tensor<3>,
        times: &[f32],
        grid: [usize; 2],
        see: See<'_>,
    ) -> EmmditState {
        let image = self.embed(latents, grid); // [B, T, D]
        see(&|| "pos_embed".to_owned(), &image);
        let (embedded, time) = self.time.forward(times); // [B, 1, D], [B, 6, D]
        see(&|| "embedded_timestep".to_owned(), &embedded);
        see(&|| "temb".to_owned(), &time);
        let text = self.text_embed.forward(text); // [B, L, D]
        see(&|| "context_embedder".to_owned(), &text);
        EmmditState {
            image,
            text,
            time,
            skip: None,
        }
    }

    pub(super) fn advance_observed(
        &self,
        index: usize,
        state: EmmditState,
        grid: [usize; 2],
        see: See<'_>,
    ) -> EmmditState {
        let [first, middle, _] = self.config.block_groups;
        let (group, place) = match index {
            index if index < first => (0, index),
            index if index < first + middle => (1, index - first),
            index => (2, index - first - middle),
        };
        let EmmditState {
            mut image,
            text,
            time,
            mut skip,
        } = state;
        // A middle group without blocks is entered and left at once.
        let (enters, leaves) = (index == first, index == first + middle);
        if let (true, Some((compressor, _))) = (enters, &self.compression) {
            let compressed = compressor.forward(image.clone(), grid); // [B, T/4 + T/16, D]
            see(&|| "tokencompressor".to_owned(), &compressed);
            skip = Some(std::mem::replace(&mut image, compressed));
        }
        if let (true, Some((_, reconstructor))) = (leaves, &self.compression) {
            if let Some(skip) = skip.take() {
                image = reconstructor.forward(image, skip, grid); // [B, T, D]
            }
            see(&|| "tokenreconstructor".to_owned(), &image);
        }
        if leaves && self.config.position_reinforcement {
            let positions = self.reinforcement(grid);
            see(&|| "pos_embed_lv0".to_owned(), &positions);
            image = image + positions;
        }
        let block = &self.groups[group][place];
        let [image, text] = block.forward(image, text, &time);
        see(&|| format!("block.{index:02}.hidden"), &image);
        if block.updates_text() {
            see(&|| format!("block.{index:02}.context"), &text);
        }
        EmmditState {
            image,
            text,
            time,
            skip,
        }
    }
}
