//! Memory of packed weights: large anonymous mappings on huge pages, cut into pieces.
//!
//! A model's weights are hundreds of megabytes that every forward pass walks through once; on 4 KiB
//! pages each kilobyte or so of them would cost a walk through the page tables.

use std::sync::{Arc, Mutex};

/// Size of a mapping that small pieces share. What is never written takes no memory.
const CHUNK: usize = 64 << 20;
/// Pieces start on cache lines.
const ALIGN: usize = 64;

/// A mapping, or ordinary memory where mappings fail.
enum Storage {
    Mapped(memmap2::MmapMut),
    Heap(Vec<crate::pool::Line>),
}

struct Chunk {
    storage: Storage,
    start: *mut u8,
}

// SAFETY: the chunk is plain memory; pieces of it are disjoint and each has one owner.
unsafe impl Send for Chunk {}
// SAFETY: as above; a piece is written only through `&mut`.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(len: usize) -> Self {
        let mut storage = match memmap2::MmapMut::map_anon(len) {
            Ok(map) => {
                // A hint: without huge pages the memory is merely slower.
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                Storage::Mapped(map)
            }
            Err(_) => Storage::Heap(vec![crate::pool::Line([0; 16]); len.div_ceil(ALIGN)]),
        };
        let start = match &mut storage {
            Storage::Mapped(map) => map.as_mut_ptr(),
            Storage::Heap(lines) => lines.as_mut_ptr().cast(),
        };
        Chunk { storage, start }
    }

    fn len(&self) -> usize {
        match &self.storage {
            Storage::Mapped(map) => map.len(),
            Storage::Heap(lines) => lines.len() * ALIGN,
        }
    }
}

/// The chunk that the next small piece is cut from, and how much of it is taken.
static CURRENT: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

/// A piece of zeroed memory, aligned to 64 bytes.
pub(crate) struct Piece {
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

impl Piece {
    pub(crate) fn new(len: usize) -> Self {
        let rounded = len.next_multiple_of(ALIGN);
        if rounded > CHUNK / 2 {
            let chunk = Arc::new(Chunk::new(rounded));
            return Piece {
                chunk,
                offset: 0,
                len,
            };
        }
        let mut current = CURRENT.lock().unwrap_or_else(|e| e.into_inner());
        let fits = |(chunk, taken): &(Arc<Chunk>, usize)| taken + rounded <= chunk.len();
        let (chunk, taken) = match current.take().filter(fits) {
            Some(current) => current,
            None => (Arc::new(Chunk::new(CHUNK)), 0),
        };
        *current = Some((chunk.clone(), taken + rounded));
        Piece {
            chunk,
            offset: taken,
            len,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.chunk.start.wrapping_add(self.offset)
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.chunk.start.wrapping_add(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_zeroed_and_apart() {
        let mut pieces: Vec<Piece> = [1, 100, 64, CHUNK / 2 + 1, 4096]
            .into_iter()
            .map(Piece::new)
            .collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr() as usize % ALIGN, 0);
            // SAFETY: a piece holds `len` bytes.
            let bytes = unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr(), piece.len()) };
            assert!(bytes.iter().all(|&b| b == 0));
            bytes.fill(i as u8 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(piece.as_ptr(), piece.len()) };
            assert!(bytes.iter().all(|&b| b == i as u8 + 1));
        }
    }
}
