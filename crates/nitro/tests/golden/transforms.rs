//! The official image transforms: Pillow's resize, torchvision's crop and normalisation.

use anyhow::{Context, Result};
use image::RgbImage;
use nitro_data::image::{
    Filter, center_crop, dino_picture, resize_shorter, to_planes, vae_picture,
};

use crate::compare::Report;
use crate::files::{Case, Tensors};

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<()> {
    let (base, size): (u32, u32) = (case.get("/config/size_a")?, case.get("/config/size_b")?);
    let (mean, std) = (case.get("/config/mean")?, case.get("/config/std")?);
    let off = case.get::<f64>("/tolerance/u8_max_abs")?;
    let tolerance = case.rel_l2()?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    for file in case.get::<Vec<String>>("/inputs/files")? {
        let input = picture(&inputs, &format!("{file}.rgb"))?;
        let decoded = nitro_data::image::decode(&std::fs::read(case.dir.join(&file))?);
        let same = decoded.is_ok_and(|decoded| decoded == input);
        report.equal(&format!("{file} decoded"), &same, &true);

        let dino = dino_picture(&input, base, size);
        let vae_resized = resize_shorter(&input, base, Filter::Bicubic);
        let bytes = [
            (
                "dino_resized_u8",
                resize_shorter(&input, base, Filter::Bilinear),
            ),
            ("dino_final_u8", dino.clone()),
            ("vae_resized_u8", vae_resized.clone()),
        ];
        for (name, found) in bytes {
            let expected = picture(&outputs, &format!("{file}.{name}"))?;
            let title = format!("{file} {name}");
            report.equal(
                &format!("{title} size"),
                &found.dimensions(),
                &expected.dimensions(),
            );
            let pairs = found.as_raw().iter().zip(expected.as_raw());
            let worst = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(255);
            report.at_most(&title, worst.into(), off);
        }
        let vae = vae_picture(&input, base);
        report.equal(
            &format!("{file} crop"),
            &(vae == center_crop(&vae_resized, base)),
            &true,
        );
        let planes = [
            ("dino", to_planes(&dino, mean, std)),
            ("vae", to_planes(&vae, [0.5; 3], [0.5; 3])),
        ];
        for (name, found) in planes {
            let expected = outputs.f32s(&format!("{file}.{name}"))?;
            report.close(&format!("{file} {name}"), &found, &expected, tolerance);
        }
    }
    Ok(())
}

fn picture(tensors: &Tensors, name: &str) -> Result<RgbImage> {
    let array = tensors.get(name)?;
    let &[height, width, 3] = array.shape.as_slice() else {
        anyhow::bail!("{name} has shape {:?}", array.shape);
    };
    RgbImage::from_raw(width as u32, height as u32, array.bytes.clone()).context("a picture")
}
