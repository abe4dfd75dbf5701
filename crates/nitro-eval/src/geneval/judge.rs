//! GenEval with its own eyes: detector, colours and rules together.

use std::collections::HashMap;

use image::RgbImage;

use super::{Detections, ImageResult, Kept, Metadata, Options, evaluate_image, official};
use crate::EvalError;
use crate::scorers::{Background, ColorClassifier, Detector, Instance, object_crop};

/// What looks at pictures.
#[derive(Debug)]
pub struct Judge {
    detector: Detector,
    colors: ColorClassifier,
    objects: Vec<&'static str>,
}

impl Judge {
    /// A judge with this detector and colour classifier.
    pub fn new(detector: Detector, colors: ColorClassifier) -> Self {
        Self {
            detector,
            colors,
            objects: official::objects(),
        }
    }

    /// Judges a picture under several settings, and gives a record for each.
    ///
    /// # Errors
    /// When a model refuses its input, or the metadata refers to a clause that is not there.
    pub fn judge(
        &mut self,
        filename: &str,
        image: &RgbImage,
        metadata: &Metadata,
        settings: &[Options],
    ) -> Result<Vec<ImageResult>, EvalError> {
        let mut found: Vec<(&str, Vec<Instance>)> = Vec::new();
        for instance in self.detector.detect(image)? {
            // A detector with more classes than GenEval names sees the rest in vain.
            let Some(class) = self.objects.get(instance.label) else {
                continue;
            };
            match found.iter_mut().find(|(name, _)| name == class) {
                Some((_, of_class)) => of_class.push(instance),
                None => found.push((class, vec![instance])),
            }
        }
        // GenEval goes through the classes in the detector's order.
        found.sort_by_key(|(class, _)| self.objects.iter().position(|name| name == class));
        let boxes = |of_class: &[Instance]| of_class.iter().map(|i| i.scored).collect();
        let detections = Detections(
            found
                .iter()
                .map(|(class, of_class)| ((*class).to_owned(), boxes(of_class)))
                .collect(),
        );
        let mut seen = Colors {
            classifier: &mut self.colors,
            image,
            found: &found,
            known: HashMap::new(),
        };
        let mut records = Vec::with_capacity(settings.len());
        for options in settings {
            let (verdict, kept) = evaluate_image(&detections, metadata, options, |class, kept| {
                seen.of(class, kept)
            })?;
            records.push(ImageResult::new(filename, metadata, verdict, &kept));
        }
        Ok(records)
    }
}

/// The colours of a picture's objects, each found out once.
struct Colors<'a> {
    classifier: &'a mut ColorClassifier,
    image: &'a RgbImage,
    found: &'a [(&'a str, Vec<Instance>)],
    known: HashMap<(String, usize), String>,
}

impl Colors<'_> {
    fn of(&mut self, class: &str, kept: &[Kept]) -> Result<Vec<String>, EvalError> {
        let of_class = self.found.iter().find(|(name, _)| *name == class);
        let of_class = of_class.map_or(&[][..], |(_, of_class)| of_class.as_slice());
        let key = |k: &Kept| (class.to_owned(), k.index);
        let new: Vec<&Kept> = kept
            .iter()
            .filter(|k| !self.known.contains_key(&key(k)))
            .collect();
        let crops: Vec<RgbImage> = new
            .iter()
            .map(|k| {
                let [x0, y0, x1, y1, _] = k.scored;
                let mask = of_class.get(k.index).map(|i| i.mask.as_slice());
                object_crop(self.image, Some([x0, y0, x1, y1]), mask, Background::Grey)
            })
            .collect();
        let colours = self.classifier.classify(&crops, class)?;
        self.known.extend(new.into_iter().map(key).zip(colours));
        Ok(kept.iter().map(|k| self.known[&key(k)].clone()).collect())
    }
}
