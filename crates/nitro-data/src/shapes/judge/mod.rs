//! The exact judge: reads class, colour and box of every object back from pixels.
//!
//! `segment` names each pixel's colour against the fitted grey background and joins equal
//! neighbours; `template` names the silhouette. A detection's confidence is the IoU of its
//! silhouette with the best template.

mod segment;
mod template;

use serde::{Deserialize, Serialize};

use super::{Class, Colour, ShapesError};

/// A connected component smaller than this share of the picture is no object.
pub const MIN_AREA: f32 = 0.004;

/// One object found in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// Class of the best template.
    pub class: Class,
    /// Nearest palette colour of the component's mean.
    pub colour: Colour,
    /// `[x0, y0, x1, y1]` in pixels, right and bottom exclusive.
    pub bbox: [f32; 4],
    /// IoU with the best template, 0 to 1.
    pub confidence: f32,
}

/// Finds the objects of an RGB picture (`height * width * 3` bytes, rows from the top), largest
/// first.
///
/// # Errors
/// When the buffer does not fit the dimensions, or a side is below 32 pixels.
pub fn judge(rgb: &[u8], width: usize, height: usize) -> Result<Vec<Detection>, ShapesError> {
    let expected = width * height * 3;
    if rgb.len() != expected {
        return Err(ShapesError::BufferSize {
            what: "judge",
            expected,
            actual: rgb.len(),
        });
    }
    if width.min(height) < 32 {
        return Err(ShapesError::TooSmall { width, height });
    }
    let view = segment::View { rgb, width, height };
    let detections = segment::components(&view)
        .iter()
        .map(|component| {
            let silhouette = component.silhouette(&view);
            let (class, confidence) = template::classify(&silhouette);
            Detection {
                class,
                colour: component.nearest_colour(&view),
                bbox: component.bbox(),
                confidence,
            }
        })
        .collect();
    Ok(detections)
}

#[cfg(test)]
mod tests;
