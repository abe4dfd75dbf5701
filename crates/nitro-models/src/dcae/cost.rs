//! What a DC-AE's two halves cost, counted from their configuration.

use super::blocks::GLU_RATIO;
use super::config::{BlockType, DcaeConfig, Downsample, Stage, Upsample};
use crate::WeightError;

/// Multiply-adds of a 3x3 convolution, per output pixel.
const fn conv3(inputs: usize, outputs: usize) -> usize {
    9 * inputs * outputs
}

impl DcaeConfig {
    /// Floating-point operations (two per multiply-add) of encoding an image of `side` x `side`
    /// pixels: all convolutions (counted directly, as if none were transformed) and products, in
    /// units of 10^9.
    pub fn encoder_gflop(&self, side: usize) -> Result<f64, WeightError> {
        let stages = self.encoder_stages()?;
        let pixels = |stage: usize| (side >> stage) * (side >> stage);
        let down = |inputs: usize, outputs: usize, fine: usize| match self.downsample_block_type {
            Downsample::Conv => conv3(inputs, outputs) * pixels(fine + 1),
            Downsample::PixelUnshuffle => conv3(inputs, outputs / 4) * pixels(fine),
        };
        let mut products = match stages[0].layers {
            0 => down(self.in_channels, stages[1].channels, 0),
            _ => conv3(self.in_channels, stages[0].channels) * pixels(0),
        };
        for (i, stage) in stages.iter().enumerate() {
            products += stage.layers * self.block_products(stage) * pixels(i);
            if let Some(next) = stages.get(i + 1).filter(|_| stage.layers > 0) {
                products += down(stage.channels, next.channels, i);
            }
        }
        let last = stages.len() - 1;
        products += conv3(stages[last].channels, self.latent_channels) * pixels(last);
        Ok(2.0 * products as f64 / 1e9)
    }

    /// The same of decoding to an image of `side` x `side` pixels.
    pub fn decoder_gflop(&self, side: usize) -> Result<f64, WeightError> {
        let stages = self.decoder_stages()?;
        let pixels = |stage: usize| (side >> stage) * (side >> stage);
        let up = |inputs: usize, outputs: usize, fine: usize| match self.upsample_block_type {
            Upsample::Interpolate => conv3(inputs, outputs) * pixels(fine),
            Upsample::PixelShuffle => conv3(inputs, 4 * outputs) * pixels(fine + 1),
        };
        let last = stages.len() - 1;
        let mut products = conv3(self.latent_channels, stages[last].channels) * pixels(last);
        for (i, stage) in stages.iter().enumerate() {
            products += stage.layers * self.block_products(stage) * pixels(i);
            if let Some(coarser) = stages.get(i + 1).filter(|_| stage.layers > 0) {
                products += up(coarser.channels, stage.channels, i);
            }
        }
        products += match stages[0].layers {
            0 => up(stages[1].channels, self.in_channels, 0),
            _ => conv3(stages[0].channels, self.in_channels) * pixels(0),
        };
        Ok(2.0 * products as f64 / 1e9)
    }

    /// Multiply-adds of one block, per pixel.
    fn block_products(&self, stage: &Stage) -> usize {
        let c = stage.channels;
        match stage.block {
            BlockType::ResBlock => 2 * conv3(c, c),
            BlockType::EfficientViTBlock => {
                let head = self.attention_head_dim;
                let branches = 1 + stage.scales.len();
                let mixing: usize = stage.scales.iter().map(|k| 3 * c * (k * k + head)).sum();
                // Keys times values and their sum, then queries times that, in each branch.
                let attention = 2 * branches * c * (head + 1);
                let hidden = GLU_RATIO * c;
                let gated = c * 2 * hidden + 9 * 2 * hidden + hidden * c;
                3 * c * c + mixing + attention + branches * c * c + gated
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sana_at_512_pixels_costs_what_was_counted_by_hand() {
        let config = DcaeConfig::sana_f32c32();
        let decode = config.decoder_gflop(512).unwrap();
        let encode = config.encoder_gflop(512).unwrap();
        assert!((decode - 2092.0).abs() < 5.0, "{decode}");
        assert!((encode - 1295.0).abs() < 5.0, "{encode}");
    }
}
