//! JPEG decoding (ITU T.81) to the pixels of libjpeg-turbo, which the official pipeline's PIL uses:
//! its integer inverse transform, its "fancy" upsampling of chroma and its colour conversion, bit by
//! bit. Decoders that differ in one of them are off by up to 14 of 255 at the edges of pictures
//! whose sides are no multiple of 16, and by 2 elsewhere.
//!
//! Baseline, extended and progressive Huffman streams of 8 bits with one or three components; other
//! kinds (CMYK, arithmetic coding, 12 bits) are left to the `image` crate.

mod entropy;
mod pixels;

use image::RgbImage;

use entropy::{Bits, Huffman, Scan};

/// Sides of a block.
const BLOCK: usize = 8;
/// Coefficients of a block.
const AREA: usize = BLOCK * BLOCK;

/// Where the k-th coefficient of the stream stands in a block.
const ZIGZAG: [u8; AREA] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// One colour component.
struct Component {
    id: u8,
    /// Sampling factors, horizontal and vertical.
    sampling: [usize; 2],
    quantizer: usize,
    /// The quantizer's values in block order, as they stood at the component's first scan.
    table: Option<[u16; AREA]>,
    /// Samples that belong to the picture.
    size: [usize; 2],
    /// Blocks stored, whole MCUs.
    blocks: [usize; 2],
    /// Coefficients in block order.
    coefficients: Vec<i16>,
}

/// What a frame header says.
struct Frame {
    width: usize,
    height: usize,
    progressive: bool,
    /// Largest sampling factors.
    most: [usize; 2],
    /// MCUs of an interleaved scan.
    mcus: [usize; 2],
    components: Vec<Component>,
}

#[derive(Default)]
struct Decoder {
    quantizers: [Option<[u16; AREA]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    restart_interval: usize,
    jfif: bool,
    adobe: Option<u8>,
    frame: Option<Frame>,
    scans: usize,
}

/// The picture, or `None` where it is of a kind that this decoder does not know.
pub(super) fn decode(bytes: &[u8]) -> Result<Option<RgbImage>, String> {
    let mut decoder = Decoder::default();
    let mut at = 2;
    loop {
        let Some((marker, next)) = find_marker(bytes, at) else {
            return Err("the file ends early".to_owned());
        };
        at = next;
        match marker {
            0xd9 => break,
            0x01 | 0xd0..=0xd8 => continue,
            _ => {}
        }
        let length = bytes
            .get(at..at + 2)
            .map(|b| usize::from(b[0]) << 8 | usize::from(b[1]));
        let segment = length
            .filter(|length| *length >= 2)
            .and_then(|length| bytes.get(at + 2..at + length))
            .ok_or("the file ends within a segment")?;
        at += segment.len() + 2;
        match marker {
            0xc0..=0xc2 => match read_frame(segment, marker == 0xc2)? {
                Some(frame) if decoder.frame.is_none() => decoder.frame = Some(frame),
                Some(_) => return Err("it has two frames".to_owned()),
                None => return Ok(None),
            },
            0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Ok(None),
            0xc4 => decoder.huffman_tables(segment)?,
            0xdb => decoder.quantizers(segment)?,
            0xdd => match segment {
                &[high, low] => {
                    decoder.restart_interval = usize::from(high) << 8 | usize::from(low)
                }
                _ => return Err("a bad restart interval".to_owned()),
            },
            0xda => at += decoder.scan(segment, &bytes[at..])?,
            0xe0 => decoder.jfif |= segment.starts_with(b"JFIF\0"),
            0xee if segment.starts_with(b"Adobe") => decoder.adobe = segment.get(11).copied(),
            _ => {}
        }
    }
    decoder.picture()
}

/// The next marker at or behind `at`, and what follows it.
fn find_marker(bytes: &[u8], mut at: usize) -> Option<(u8, usize)> {
    loop {
        while *bytes.get(at)? != 0xff {
            at += 1;
        }
        while *bytes.get(at)? == 0xff {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        if marker != 0 {
            return Some((marker, at));
        }
    }
}

fn read_frame(segment: &[u8], progressive: bool) -> Result<Option<Frame>, String> {
    let &[precision, h1, h0, w1, w0, count, ref rest @ ..] = segment else {
        return Err("a short frame header".to_owned());
    };
    if precision != 8 || !matches!(count, 1 | 3) {
        return Ok(None);
    }
    let side = |high: u8, low: u8| usize::from(high) << 8 | usize::from(low);
    let (width, height) = (side(w1, w0), side(h1, h0));
    let (specs, _) = rest.as_chunks::<3>();
    if width == 0 || height == 0 || specs.len() < usize::from(count) {
        return Err("a bad frame header".to_owned());
    }
    let specs = &specs[..usize::from(count)];
    let sampling = |spec: &[u8; 3]| [usize::from(spec[1] >> 4), usize::from(spec[1] & 15)];
    let fine = |spec: &[u8; 3]| sampling(spec).iter().all(|f| (1..=4).contains(f)) && spec[2] < 4;
    if !specs.iter().all(fine) {
        return Err("bad sampling factors".to_owned());
    }
    let most = specs.iter().fold([1, 1], |[h, v], spec| {
        let [sh, sv] = sampling(spec);
        [h.max(sh), v.max(sv)]
    });
    let mcus = [
        width.div_ceil(BLOCK * most[0]),
        height.div_ceil(BLOCK * most[1]),
    ];
    let component = |spec: &[u8; 3]| {
        let [h, v] = sampling(spec);
        let blocks = [mcus[0] * h, mcus[1] * v];
        Component {
            id: spec[0],
            sampling: [h, v],
            quantizer: usize::from(spec[2]),
            table: None,
            size: [
                (width * h).div_ceil(most[0]),
                (height * v).div_ceil(most[1]),
            ],
            blocks,
            coefficients: vec![0; blocks[0] * blocks[1] * AREA],
        }
    };
    Ok(Some(Frame {
        width,
        height,
        progressive,
        most,
        mcus,
        components: specs.iter().map(component).collect(),
    }))
}

impl Decoder {
    fn quantizers(&mut self, mut segment: &[u8]) -> Result<(), String> {
        while let Some((&head, rest)) = segment.split_first() {
            let (wide, slot) = (head >> 4 != 0, usize::from(head & 15));
            let size = if wide { 2 * AREA } else { AREA };
            let (values, behind) = rest.split_at_checked(size).ok_or("a short quantizer")?;
            let mut table = [0; AREA];
            for (k, place) in ZIGZAG.iter().enumerate() {
                table[usize::from(*place)] = match wide {
                    true => u16::from(values[2 * k]) << 8 | u16::from(values[2 * k + 1]),
                    false => values[k].into(),
                };
            }
            *self
                .quantizers
                .get_mut(slot)
                .ok_or("a bad quantizer number")? = Some(table);
            segment = behind;
        }
        Ok(())
    }

    fn huffman_tables(&mut self, mut segment: &[u8]) -> Result<(), String> {
        while let Some((&head, rest)) = segment.split_first() {
            let (counts, rest) = rest
                .split_first_chunk::<16>()
                .ok_or("a short Huffman table")?;
            let total = counts.iter().map(|count| usize::from(*count)).sum();
            let (symbols, behind) = rest
                .split_at_checked(total)
                .ok_or("a short Huffman table")?;
            let tables = if head >> 4 == 0 {
                &mut self.dc
            } else {
                &mut self.ac
            };
            let slot = tables
                .get_mut(usize::from(head & 15))
                .ok_or("a bad table number")?;
            *slot = Some(Huffman::new(counts, symbols)?);
            segment = behind;
        }
        Ok(())
    }

    /// Decodes a scan whose header is `segment` and gives the bytes of its data.
    fn scan(&mut self, segment: &[u8], data: &[u8]) -> Result<usize, String> {
        let frame = self.frame.as_mut().ok_or("a scan before the frame")?;
        let (&count, rest) = segment.split_first().ok_or("a short scan header")?;
        let (specs, tail) = rest
            .split_at_checked(2 * usize::from(count))
            .ok_or("a short scan header")?;
        let &[first, last, approximation] = tail else {
            return Err("a bad scan header".to_owned());
        };
        let mut parts = Vec::new();
        for spec in specs.chunks_exact(2) {
            let number = frame
                .components
                .iter()
                .position(|component| component.id == spec[0]);
            let number = number.ok_or("a scan of an unknown component")?;
            let component = &mut frame.components[number];
            if component.table.is_none() {
                component.table = self.quantizers[component.quantizer];
            }
            let (dc, ac) = (usize::from(spec[1] >> 4), usize::from(spec[1] & 15));
            parts.push((number, dc, ac));
        }
        let (first, last) = (usize::from(first), usize::from(last));
        let bad_range = first > last || last >= AREA || (first == 0) != (last == 0);
        let bad = parts.is_empty() || parts.len() > 3 || approximation & 15 > 13;
        if bad || (frame.progressive && (bad_range || (first > 0 && parts.len() > 1))) {
            return Err("a bad scan header".to_owned());
        }
        self.scans += 1;
        if self.scans > 500 {
            return Err("more than 500 scans".to_owned());
        }
        let mut scan = Scan {
            dc: &self.dc,
            ac: &self.ac,
            progressive: frame.progressive,
            first,
            last,
            refine: approximation >> 4 != 0,
            shift: approximation & 15,
            predictions: [0; 3],
            end_of_band: 0,
        };
        let mut bits = Bits::new(data);
        let mut left = self.restart_interval;
        let alone = parts.len() == 1;
        let mcus = match alone {
            true => frame.components[parts[0].0]
                .size
                .map(|side| side.div_ceil(BLOCK)),
            false => frame.mcus,
        };
        for mcu in 0..mcus[0] * mcus[1] {
            if self.restart_interval > 0 {
                if left == 0 {
                    bits.restart();
                    scan.predictions = [0; 3];
                    scan.end_of_band = 0;
                    left = self.restart_interval;
                }
                left -= 1;
            }
            let [x, y] = [mcu % mcus[0], mcu / mcus[0]];
            for (part, &(number, dc, ac)) in parts.iter().enumerate() {
                let component = &mut frame.components[number];
                let [h, v] = if alone { [1, 1] } else { component.sampling };
                for (dy, dx) in (0..v).flat_map(|dy| (0..h).map(move |dx| (dy, dx))) {
                    let block = (y * v + dy) * component.blocks[0] + x * h + dx;
                    let block = &mut component.coefficients[block * AREA..][..AREA];
                    scan.block(&mut bits, block, part, dc, ac)?;
                }
            }
            if bits.is_exhausted() {
                return Err("the file ends early".to_owned());
            }
        }
        Ok(bits.position())
    }

    fn picture(self) -> Result<Option<RgbImage>, String> {
        let frame = self.frame.ok_or("it has no frame")?;
        if self.scans == 0 {
            return Err("it has no scan".to_owned());
        }
        let ids: Vec<u8> = frame
            .components
            .iter()
            .map(|component| component.id)
            .collect();
        let rgb = match (self.jfif, self.adobe) {
            (true, _) => false,
            (false, Some(transform)) => transform == 0,
            (false, None) => ids == *b"RGB",
        };
        let planes = frame
            .components
            .iter()
            .map(|component| {
                let plane = pixels::inverse_transform(component)?;
                pixels::upsample(&plane, component, &frame)
            })
            .collect::<Result<Vec<_>, String>>()?;
        let data = pixels::to_rgb(&planes, rgb);
        let (width, height) = (frame.width as u32, frame.height as u32);
        Ok(RgbImage::from_raw(width, height, data))
    }
}
