//! Writes a contact sheet of rendered training examples, and their captions beside it.
//!
//! `cargo run --release -p nitro-data --example contact_sheet -- sheet.png [columns rows side seed]`

use std::time::{Duration, Instant};

use nitro_data::shapes::{Example, judge, render};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args
        .next()
        .unwrap_or_else(|| "contact_sheet.png".to_owned());
    let numbers: Vec<u64> = args.map(|a| a.parse()).collect::<Result<_, _>>()?;
    let number = |i: usize, default: u64| numbers.get(i).copied().unwrap_or(default);
    let (columns, rows) = (number(0, 8) as usize, number(1, 6) as usize);
    let (side, seed) = (number(2, 128) as usize, number(3, 0));
    let width = columns * side;
    let mut sheet = vec![0u8; width * rows * side * 3];
    let (mut painting, mut judging) = (Duration::ZERO, Duration::ZERO);
    let mut right = 0;
    for i in 0..columns * rows {
        let start = Instant::now();
        let example = Example::from_seed(seed + i as u64);
        let rgb = render(&example.scene, side);
        painting += start.elapsed();
        let start = Instant::now();
        let found = judge(&rgb, side, side)?;
        judging += start.elapsed();
        let mut seen: Vec<_> = found.iter().map(|d| (d.class, d.colour)).collect();
        let mut shown: Vec<_> = example
            .scene
            .objects
            .iter()
            .map(|o| (o.class, o.colour))
            .collect();
        seen.sort_unstable();
        shown.sort_unstable();
        right += usize::from(seen == shown);
        let (row, column) = (i / columns, i % columns);
        for (y, line) in rgb.chunks_exact(side * 3).enumerate() {
            let at = ((row * side + y) * width + column * side) * 3;
            sheet[at..at + side * 3].copy_from_slice(line);
        }
        println!(
            "{row},{column} [{}] {}",
            example.task.tag(),
            example.caption
        );
    }
    let total = columns * rows;
    let each = |t: Duration| t.as_secs_f64() * 1e3 / total.max(1) as f64;
    image::save_buffer(
        &path,
        &sheet,
        width as u32,
        (rows * side) as u32,
        image::ExtendedColorType::Rgb8,
    )?;
    println!(
        "wrote {path}: {total} pictures of {side} px, {:.3} ms each; the judge read {right} of them \
         wholly right in {:.3} ms each",
        each(painting),
        each(judging)
    );
    Ok(())
}
