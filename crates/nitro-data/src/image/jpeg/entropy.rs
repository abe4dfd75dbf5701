//! The entropy-coded part: bits, Huffman codes, blocks.

use super::{AREA, ZIGZAG};

/// Bits of a scan's data, with stuffed bytes taken out. Behind the data come zeros.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    word: u64,
    count: u32,
    /// Zero bytes made up because the file, not the scan, was at its end.
    missing: usize,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            word: 0,
            count: 0,
            missing: 0,
        }
    }

    fn fill(&mut self) {
        while self.count <= 56 {
            let byte = match self.data.get(self.at..) {
                Some([0xff, 0x00, ..]) => {
                    self.at += 2;
                    0xff
                }
                // A marker: the scan's data is over.
                Some([0xff, _, ..]) => 0,
                Some([byte, rest @ ..]) if *byte != 0xff || !rest.is_empty() => {
                    self.at += 1;
                    *byte
                }
                _ => {
                    self.missing += 1;
                    0
                }
            };
            self.word |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    /// The next `count` bits, up to 16, without taking them.
    fn peek(&mut self, count: u32) -> u32 {
        if self.count < count {
            self.fill();
        }
        match count {
            0 => 0,
            _ => (self.word >> (64 - count)) as u32,
        }
    }

    fn skip(&mut self, count: u32) {
        self.word <<= count;
        self.count -= count;
    }

    fn take(&mut self, count: u32) -> u32 {
        let bits = self.peek(count);
        self.skip(count);
        bits
    }

    /// `count` bits as a signed number in JPEG's way: half of the numbers of that length each.
    fn signed(&mut self, count: u32) -> i32 {
        let bits = self.take(count) as i32;
        match count {
            0 => 0,
            _ if bits < 1 << (count - 1) => bits - (1 << count) + 1,
            _ => bits,
        }
    }

    /// Goes on behind the restart marker that stands here.
    pub(super) fn restart(&mut self) {
        (self.word, self.count) = (0, 0);
        let is_restart = |pair: &[u8]| pair[0] == 0xff && (0xd0..=0xd7).contains(&pair[1]);
        let rest = self.data.get(self.at..).unwrap_or_default();
        match rest
            .windows(2)
            .position(|pair| pair[0] == 0xff && pair[1] != 0 && pair[1] != 0xff)
        {
            Some(marker) if is_restart(&rest[marker..marker + 2]) => self.at += marker + 2,
            _ => {}
        }
    }

    /// Whether bits were needed that the file does not have.
    pub(super) fn is_exhausted(&self) -> bool {
        8 * self.missing > self.count as usize
    }

    /// Bytes read.
    pub(super) fn position(&self) -> usize {
        self.at.min(self.data.len())
    }
}

/// Bits that are decoded with one look into a table.
const LOOK: u32 = 9;

/// A Huffman code.
pub(super) struct Huffman {
    symbols: Vec<u8>,
    /// Length and symbol by the next `LOOK` bits; length 0 for longer codes.
    quick: Vec<(u8, u8)>,
    /// Behind the last code of each length, aligned to 16 bits.
    ends: [u32; 17],
    /// What to add to a code of each length to get its symbol's place.
    offsets: [i32; 17],
}

impl Huffman {
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self, String> {
        let mut this = Self {
            symbols: symbols.to_vec(),
            quick: vec![(0, 0); 1 << LOOK],
            ends: [0; 17],
            offsets: [0; 17],
        };
        let (mut code, mut place) = (0u32, 0usize);
        for (length, count) in (1u32..).zip(counts) {
            let count = usize::from(*count);
            this.offsets[length as usize] = place as i32 - code as i32;
            for _ in 0..count {
                if code >= 1 << length {
                    return Err("a bad Huffman table".to_owned());
                }
                if length <= LOOK {
                    let begin = (code << (LOOK - length)) as usize;
                    let entry = (length as u8, symbols[place]);
                    this.quick[begin..begin + (1 << (LOOK - length))].fill(entry);
                }
                code += 1;
                place += 1;
            }
            this.ends[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(this)
    }

    fn decode(&self, bits: &mut Bits<'_>) -> Result<u8, String> {
        let look = bits.peek(16);
        let (length, symbol) = self.quick[(look >> (16 - LOOK)) as usize];
        if length > 0 {
            bits.skip(length.into());
            return Ok(symbol);
        }
        for length in LOOK + 1..=16 {
            if look < self.ends[length as usize] {
                bits.skip(length);
                let code = (look >> (16 - length)) as i32;
                let place = usize::try_from(code + self.offsets[length as usize]).ok();
                let symbol = place.and_then(|place| self.symbols.get(place));
                return symbol.copied().ok_or_else(|| "a bad code".to_owned());
            }
        }
        Err("a bad code".to_owned())
    }
}

/// The state of a scan.
pub(super) struct Scan<'a> {
    pub(super) dc: &'a [Option<Huffman>; 4],
    pub(super) ac: &'a [Option<Huffman>; 4],
    pub(super) progressive: bool,
    /// First and last coefficient, in stream order.
    pub(super) first: usize,
    pub(super) last: usize,
    /// Whether bits are added to coefficients that are there.
    pub(super) refine: bool,
    pub(super) shift: u8,
    pub(super) predictions: [i32; 3],
    /// Blocks that are over before they begin.
    pub(super) end_of_band: u32,
}

impl Scan<'_> {
    /// Decodes what the scan has of a block of its component number `part`.
    pub(super) fn block(
        &mut self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        part: usize,
        dc: usize,
        ac: usize,
    ) -> Result<(), String> {
        let table = |tables: &'_ [Option<Huffman>; 4], number: usize| -> Result<(), String> {
            let there = tables.get(number).is_some_and(Option::is_some);
            there
                .then_some(())
                .ok_or_else(|| "a Huffman table is missing".to_owned())
        };
        if !self.progressive || (self.first == 0 && !self.refine) {
            table(self.dc, dc)?;
            self.dc_first(bits, block, part, dc)?;
        } else if self.first == 0 {
            block[0] |= (bits.take(1) as i16) << self.shift;
        }
        if !self.progressive {
            table(self.ac, ac)?;
            return self.ac_sequential(bits, block, ac);
        }
        if self.first > 0 {
            table(self.ac, ac)?;
            return match self.refine {
                false => self.ac_first(bits, block, ac),
                true => self.ac_refine(bits, block, ac),
            };
        }
        Ok(())
    }

    fn symbol(
        tables: &[Option<Huffman>; 4],
        number: usize,
        bits: &mut Bits<'_>,
    ) -> Result<u8, String> {
        match &tables[number] {
            Some(table) => table.decode(bits),
            None => Err("a Huffman table is missing".to_owned()),
        }
    }

    fn dc_first(
        &mut self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        part: usize,
        dc: usize,
    ) -> Result<(), String> {
        let length = Self::symbol(self.dc, dc, bits)?;
        if length > 15 {
            return Err("a bad coefficient".to_owned());
        }
        let prediction = &mut self.predictions[part];
        *prediction = prediction.wrapping_add(bits.signed(length.into()));
        let shift = if self.progressive { self.shift } else { 0 };
        block[0] = (*prediction << shift) as i16;
        Ok(())
    }

    fn ac_sequential(
        &self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        ac: usize,
    ) -> Result<(), String> {
        let mut k = 1;
        while k < AREA {
            let symbol = Self::symbol(self.ac, ac, bits)?;
            let (run, length) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            match (run, length) {
                (15, 0) => k += 16,
                (_, 0) => break,
                _ => {
                    k += run;
                    let place = ZIGZAG.get(k).ok_or("a run behind the block's end")?;
                    block[usize::from(*place)] = bits.signed(length) as i16;
                    k += 1;
                }
            }
        }
        Ok(())
    }

    fn ac_first(
        &mut self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        ac: usize,
    ) -> Result<(), String> {
        if self.end_of_band > 0 {
            self.end_of_band -= 1;
            return Ok(());
        }
        let mut k = self.first;
        while k <= self.last {
            let symbol = Self::symbol(self.ac, ac, bits)?;
            let (run, length) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            match (run, length) {
                (15, 0) => k += 16,
                (_, 0) => {
                    self.end_of_band = (1 << run) - 1 + bits.take(run);
                    break;
                }
                _ => {
                    k += run as usize;
                    let place = ZIGZAG.get(k).ok_or("a run behind the block's end")?;
                    block[usize::from(*place)] = (bits.signed(length) << self.shift) as i16;
                    k += 1;
                }
            }
        }
        Ok(())
    }

    fn ac_refine(
        &mut self,
        bits: &mut Bits<'_>,
        block: &mut [i16],
        ac: usize,
    ) -> Result<(), String> {
        let bit = 1i16 << self.shift;
        let correct = |bits: &mut Bits<'_>, value: &mut i16| {
            if bits.take(1) == 1 && *value & bit == 0 {
                *value = value.wrapping_add(if *value >= 0 { bit } else { -bit });
            }
        };
        let mut k = self.first;
        if self.end_of_band == 0 {
            while k <= self.last {
                let symbol = Self::symbol(self.ac, ac, bits)?;
                let (mut run, length) = (u32::from(symbol >> 4), symbol & 15);
                let new = match length {
                    0 if run < 15 => {
                        self.end_of_band = (1 << run) + bits.take(run);
                        break;
                    }
                    0 => 0,
                    _ if bits.take(1) == 1 => bit,
                    _ => -bit,
                };
                // `run` zeros are passed over; what is not zero on the way is corrected.
                while k <= self.last {
                    let value = &mut block[usize::from(ZIGZAG[k])];
                    if *value != 0 {
                        correct(bits, value);
                    } else if run == 0 {
                        *value = new;
                        k += 1;
                        break;
                    } else {
                        run -= 1;
                    }
                    k += 1;
                }
            }
        }
        if self.end_of_band > 0 {
            for place in &ZIGZAG[k..=self.last] {
                let value = &mut block[usize::from(*place)];
                if *value != 0 {
                    correct(bits, value);
                }
            }
            self.end_of_band -= 1;
        }
        Ok(())
    }
}
