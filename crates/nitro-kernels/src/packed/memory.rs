//! Memory of packed weights: large anonymous mappings on huge pages, cut into pieces; or a mapped file
//! that they were kept in.
//!
//! A model's weights are hundreds of megabytes that every forward pass walks through once; on 4 KiB
//! pages each kilobyte or so of them would cost a walk through the page tables.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::mapped_file::MappedFile;
use crate::pool::{SharedPtr, par_for};

/// Size of a mapping that small pieces share. What is never written takes no memory.
const CHUNK: usize = 64 << 20;
/// Pieces start on cache lines.
const ALIGN: usize = 64;

/// What one thread copies at a time.
const COPIED: usize = 2 << 20;

/// For tests under a sanitizer (`scripts/sanitize.sh`): every piece and every scratch buffer is an
/// allocation of its own and as large as was asked for, so that accesses beyond it are noticed.
pub(crate) const EXACT: bool = cfg!(nitro_sanitize);

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
    /// Ordinary memory.
    fn small(len: usize) -> Self {
        let mut lines = vec![crate::pool::Line([0; 16]); len.div_ceil(ALIGN)];
        Chunk {
            start: lines.as_mut_ptr().cast(),
            storage: Storage::Heap(lines),
        }
    }

    fn new(len: usize) -> Self {
        if EXACT {
            return Chunk::small(len);
        }
        let mut map = match memmap2::MmapMut::map_anon(len) {
            Ok(map) => map,
            Err(_) => return Chunk::small(len),
        };
        // A hint: without huge pages the memory is merely slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Chunk {
            start: map.as_mut_ptr(),
            storage: Storage::Mapped(map),
        }
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
        if EXACT || rounded > CHUNK / 2 {
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

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.chunk.start.wrapping_add(self.offset)
    }

    /// The same memory, to whole cache lines, not to be changed any more.
    pub(crate) fn freeze(self) -> PackedBytes {
        PackedBytes {
            start: self.chunk.start.wrapping_add(self.offset),
            len: self.len.next_multiple_of(ALIGN),
            _owner: self.chunk,
        }
    }
}

/// Packed weights that nobody changes any more: in memory, or in a mapped file. They begin on a cache
/// line, and are whole cache lines.
///
/// Clones share the bytes.
#[derive(Clone)]
pub struct PackedBytes {
    start: *const u8,
    len: usize,
    /// Keeps the bytes where they are.
    _owner: Arc<dyn Send + Sync>,
}

// SAFETY: plain memory that is only read, kept by an owner that may itself be sent.
unsafe impl Send for PackedBytes {}
// SAFETY: as above.
unsafe impl Sync for PackedBytes {}

impl std::fmt::Debug for PackedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedBytes")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// No bytes.
impl Default for PackedBytes {
    fn default() -> Self {
        PackedBytes {
            start: std::ptr::without_provenance(ALIGN),
            len: 0,
            _owner: Arc::new(()),
        }
    }
}

impl PackedBytes {
    /// The bytes of `file` at `range`, where they stay. `None` if the file does not hold them, or they
    /// are not whole cache lines.
    pub fn of_file(file: &Arc<MappedFile>, range: Range<usize>) -> Option<Self> {
        let bytes = file.as_bytes().get(range)?;
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(ALIGN);
        (aligned && bytes.len().is_multiple_of(ALIGN)).then(|| PackedBytes {
            start: bytes.as_ptr(),
            len: bytes.len(),
            _owner: file.clone(),
        })
    }

    /// The same bytes in memory of their own, on huge pages.
    pub fn copied(&self) -> Self {
        let mut piece = Piece::new(self.len);
        let to = SharedPtr(piece.as_mut_ptr());
        par_for(self.len.div_ceil(COPIED), |part| {
            let part = &self.as_bytes()[part * COPIED..][..COPIED.min(self.len - part * COPIED)];
            let at = part.as_ptr() as usize - self.start as usize;
            // SAFETY: the piece is as long as these bytes, new, and each part is written by one task.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to.get().add(at), part.len()) };
        });
        piece.freeze()
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the owner keeps `len` initialised bytes from `start` on, which nobody writes.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// The `count` numbers from byte `at` on.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn numbers<T: Number>(&self, at: usize, count: usize) -> &[T] {
        assert!(at.is_multiple_of(ALIGN) && at + count * size_of::<T>() <= self.len);
        // SAFETY: inside the bytes, from a cache line on; any bits are a number.
        unsafe { std::slice::from_raw_parts(self.start.add(at).cast(), count) }
    }
}

/// What packed weights are made of: four bytes of which all patterns are values.
pub(crate) trait Number: Copy {}

impl Number for f32 {}
impl Number for i32 {}

/// Buffers from this size on are mapped: page by page from the system, the memory of an autoencoder's
/// first picture would cost a tenth of a second and more.
const LARGE: usize = 2 << 20;

/// Memory of one owner, aligned to 64 bytes, on huge pages where it is large. Zeros at first.
pub(crate) struct Buffer(Chunk);

impl Buffer {
    /// At least `len` bytes.
    pub(crate) fn new(len: usize) -> Self {
        Buffer(match len {
            LARGE.. if !EXACT => Chunk::new(len.next_multiple_of(LARGE)),
            _ => Chunk::small(len),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.start
    }

    /// Overwrites everything with a byte of which four are NaN.
    pub(crate) fn spoil(&mut self) {
        // SAFETY: the chunk is plain memory of this length, with one owner.
        unsafe { self.0.start.write_bytes(0xff, self.0.len()) };
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer::new(0)
    }
}

/// A [`Buffer`] of `f32`.
#[derive(Default)]
pub(crate) struct Floats {
    buffer: Buffer,
    len: usize,
}

impl Floats {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        Floats {
            buffer: Buffer::new(len * size_of::<f32>()),
            len,
        }
    }
}

impl std::fmt::Debug for Floats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Floats").field("len", &self.len).finish()
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the buffer holds `len` values, aligned, initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.buffer.0.start.cast(), self.len) }
    }
}

impl std::ops::DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; the buffer has one owner.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.0.start.cast(), self.len) }
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
            assert_eq!(piece.as_mut_ptr() as usize % ALIGN, 0);
            // SAFETY: a piece holds `len` bytes.
            let bytes = unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr(), piece.len) };
            assert!(bytes.iter().all(|&b| b == 0));
            bytes.fill(i as u8 + 1);
        }
        for (i, piece) in pieces.into_iter().enumerate() {
            let len = piece.len;
            let bytes = piece.freeze();
            let (written, rest) = bytes.as_bytes().split_at(len);
            assert!(written.iter().all(|&b| b == i as u8 + 1));
            assert!(rest.len() < ALIGN && rest.iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn buffers_are_aligned_zeros_of_their_length() {
        for len in [0, 1, 1000, LARGE / 4, LARGE / 4 + 7] {
            let mut floats = Floats::new(len);
            assert!(floats.len() == len && floats.buffer.len() >= 4 * len);
            assert_eq!(floats.as_ptr() as usize % ALIGN, 0);
            assert!(floats.iter().all(|&x| x == 0.0));
            floats.fill(1.5);
            assert!(floats.iter().all(|&x| x == 1.5));
        }
    }
}
