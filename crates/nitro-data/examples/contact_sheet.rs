//! Writes a contact sheet of rendered training examples, and their captions beside it.
//!
//! `cargo run --release -p nitro-data --example contact_sheet -- sheet.png [columns rows side seed]`

use std::time::Instant;

use nitro_data::shapes::{Example, render};

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
    let start = Instant::now();
    for i in 0..columns * rows {
        let example = Example::from_seed(seed + i as u64);
        let rgb = render(&example.scene, side);
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
    let each = start.elapsed().as_secs_f64() * 1e3 / (columns * rows).max(1) as f64;
    image::save_buffer(
        &path,
        &sheet,
        width as u32,
        (rows * side) as u32,
        image::ExtendedColorType::Rgb8,
    )?;
    println!("wrote {path}; {each:.3} ms per example at {side} px");
    Ok(())
}
