//! Blocking and sharing of one product between threads.

use super::epilogue::{Activation, Epilogue, apply_with_isa};
use super::kernel::{KernelSet, LANES, MAX_ROWS, Tile};
use super::matrix::{MatRef, reach};
use super::pack::{ABlock, Layout, pack_b};
use crate::error::{KernelError, check_eq, check_len};
use crate::isa::{Isa, Precision};
use crate::pool::{Scratch, SharedPtr, num_threads, par_for};

/// Rows of A packed at once: 128 rows of 192 units are 96 KiB, a tenth of L2.
const BLOCK_ROWS: usize = 128;

/// `C = act((C if accumulate) + A B + bias)`, with A of M x K, B of K x N and C row major with rows
/// `ldc` elements apart.
///
/// # Errors
/// If the shapes disagree or `c`, the bias or the pre-activation buffer is too short.
pub fn gemm(
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    epilogue: Epilogue<'_>,
    precision: Precision,
) -> Result<(), KernelError> {
    gemm_with_isa(
        Isa::current(),
        a,
        b,
        c,
        ldc,
        accumulate,
        epilogue,
        precision,
    )
}

/// [`gemm`] on a given instruction set (or the portable one where it is not supported).
///
/// # Errors
/// As [`gemm`].
pub fn gemm_with_isa(
    isa: Isa,
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    epilogue: Epilogue<'_>,
    precision: Precision,
) -> Result<(), KernelError> {
    check_eq("gemm: rows of B against columns of A", a.cols(), b.rows())?;
    let target = Target::new(a.rows(), b.cols(), c, ldc, accumulate, epilogue)?;
    if a.rows() == 0 || b.cols() == 0 {
        return Ok(());
    }
    let set = KernelSet::new(isa, precision);
    match k_splits(&set, a.rows(), b.cols(), a.cols()) {
        None => {}
        Some(1) => {
            // SAFETY: C is ours.
            unsafe { serial(&set, a, b, &target) };
            return Ok(());
        }
        Some(splits) => {
            split_k(&set, a, b, &target, splits);
            return Ok(());
        }
    }
    packing(&set, a, b, &target);
    Ok(())
}

/// `C = act(A B + bias)`, where a row of C depends on its row of A alone: bit by bit the same, whatever
/// other rows there are and on any number of threads. [`gemm`] may add up long rows in another order
/// when there are few of them. For layers whose rows are samples, so that a sample does not depend on
/// its batch.
///
/// # Errors
/// As [`gemm`].
pub fn gemm_by_rows(
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: &mut [f32],
    ldc: usize,
    epilogue: Epilogue<'_>,
    precision: Precision,
) -> Result<(), KernelError> {
    check_eq("gemm: rows of B against columns of A", a.cols(), b.rows())?;
    let target = Target::new(a.rows(), b.cols(), c, ldc, false, epilogue)?;
    if a.rows() > 0 && b.cols() > 0 {
        packing(&KernelSet::new(Isa::current(), precision), a, b, &target);
    }
    Ok(())
}

/// The product with all of B packed first.
fn packing(set: &KernelSet, a: MatRef<'_>, b: MatRef<'_>, target: &Target) {
    let layout = Layout::new(set, a.cols(), b.cols());
    let mut packed = Scratch::take(layout.bytes());
    // SAFETY: the scratch holds `layout.bytes()` bytes and is ours.
    unsafe {
        pack_b(set, &layout, &b, packed.as_mut_ptr().cast());
        shared_b(set, &layout, packed.as_mut_ptr().cast(), &a, target);
    }
}

/// C and its epilogue, checked, in the form tasks on several threads can share.
pub(crate) struct Target {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) c: SharedPtr<f32>,
    pub(crate) ldc: usize,
    pub(crate) accumulate: bool,
    pub(crate) bias: SharedPtr<f32>,
    pub(crate) activation: Activation,
    pub(crate) pre_activation: SharedPtr<f32>,
}

impl Target {
    /// The pointers stay valid while the borrows given here last, that is during the call.
    pub(super) fn new(
        m: usize,
        n: usize,
        c: &mut [f32],
        ldc: usize,
        accumulate: bool,
        epilogue: Epilogue<'_>,
    ) -> Result<Target, KernelError> {
        if ldc < n {
            return Err(KernelError::Mismatch {
                what: "gemm: row stride of C must be at least its columns",
                expected: n,
                actual: ldc,
            });
        }
        check_len("gemm: C", reach(m, n, ldc, 1), c.len())?;
        if let Some(bias) = epilogue.bias {
            check_eq("gemm: bias values", n, bias.len())?;
        }
        if let Some(pre_activation) = &epilogue.pre_activation {
            check_len(
                "gemm: pre-activation",
                reach(m, n, ldc, 1),
                pre_activation.len(),
            )?;
        }
        Ok(Target {
            m,
            n,
            c: SharedPtr(c.as_mut_ptr()),
            ldc,
            accumulate,
            bias: SharedPtr(
                epilogue
                    .bias
                    .map_or(std::ptr::null_mut(), |b| b.as_ptr().cast_mut()),
            ),
            activation: epilogue.activation,
            pre_activation: SharedPtr(
                epilogue
                    .pre_activation
                    .map_or(std::ptr::null_mut(), |p| p.as_mut_ptr()),
            ),
        })
    }
}

/// A rectangle of C, in rows and panels.
pub(crate) struct Part {
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) panels: std::ops::Range<usize>,
}

/// The product with all of B packed: C is cut into row blocks, and into panel groups where there are
/// too few row blocks for the threads.
///
/// # Safety
/// `packed` must hold B in `layout`, packed for `set`.
pub(super) unsafe fn shared_b(
    set: &KernelSet,
    layout: &Layout,
    packed: *const f32,
    a: &MatRef<'_>,
    target: &Target,
) {
    let packed = SharedPtr(packed.cast_mut());
    let work = target.m * target.n * layout.k.max(1);
    // Below this the hand-over costs more than the second thread brings (about 20 us of one core).
    let threads = if work < 2_000_000 { 1 } else { num_threads() };
    let (row_parts, panel_parts) = cut(set, target.m, layout.panels(), threads);
    par_for(row_parts * panel_parts, |task| {
        let (i, j) = (task / panel_parts, task % panel_parts);
        let tiles = target.m.div_ceil(set.rows);
        let row = |part: usize| (tiles * part / row_parts * set.rows).min(target.m);
        let panel = |part: usize| layout.panels() * part / panel_parts;
        let part = Part {
            rows: row(i)..row(i + 1),
            panels: panel(j)..panel(j + 1),
        };
        // SAFETY: `packed` is the caller's; parts of C are disjoint.
        unsafe { run_part(set, layout, packed.get(), a, target, part) };
    });
}

/// Into how many row parts and panel parts C is cut.
fn cut(set: &KernelSet, m: usize, panels: usize, threads: usize) -> (usize, usize) {
    let tiles = m.div_ceil(set.rows);
    let by_size = m.div_ceil(BLOCK_ROWS);
    if threads == 1 {
        return (by_size, 1);
    }
    // A multiple of the thread count, so that all finish together; parts of at least four tiles.
    let row_parts = by_size
        .next_multiple_of(threads)
        .min(tiles.div_ceil(4))
        .max(1);
    if row_parts >= threads {
        return (row_parts, 1);
    }
    (row_parts, threads.div_ceil(row_parts).min(panels).max(1))
}

/// One part of C, over all of K.
///
/// # Safety
/// `packed` must hold B in `layout`; nobody else may touch the part of C.
pub(crate) unsafe fn run_part(
    set: &KernelSet,
    layout: &Layout,
    packed: *const f32,
    a: &MatRef<'_>,
    target: &Target,
    part: Part,
) {
    let rows = part.rows.len();
    let mut scratch = Scratch::take(ABlock::bytes(layout, rows));
    for block in 0..layout.blocks() {
        let from = part.rows.start;
        // SAFETY: the scratch was sized for these rows.
        let a_block =
            unsafe { ABlock::pack(set, layout, a, from, rows, block, scratch.as_mut_ptr()) };
        for panel in part.panels.clone() {
            let (first, vectors) = layout.panel(panel);
            // SAFETY: the panel lies inside the packed operand.
            let b = unsafe { packed.add(layout.offset(block, first)) };
            let place = (block, first, vectors);
            // SAFETY: as this function's contract.
            unsafe { run_panel(set, layout, target, &a_block, part.rows.clone(), place, b) }
        }
    }
}

/// One panel of one K block, over the rows of a part.
///
/// # Safety
/// As [`run_part`].
#[inline]
unsafe fn run_panel(
    set: &KernelSet,
    layout: &Layout,
    target: &Target,
    a_block: &ABlock,
    rows: std::ops::Range<usize>,
    (block, first_vector, vectors): (usize, usize, usize),
    b: *const f32,
) {
    let column = first_vector * LANES;
    let units = layout.units_of(block);
    let has_bias = block == 0 && !target.bias.get().is_null();
    let tile = Tile {
        a: [std::ptr::null(); MAX_ROWS],
        a_step: a_block.step,
        segments: 1,
        segment_units: units,
        a_segment_step: 0,
        b,
        c: [std::ptr::null_mut(); MAX_ROWS],
        rows: set.rows,
        vectors,
        cols: (target.n - column).min(vectors * LANES),
        bias: if has_bias {
            target.bias.get().wrapping_add(column)
        } else {
            std::ptr::null()
        },
        accumulate: target.accumulate || block > 0,
    };
    let finish = (block + 1 == layout.blocks()).then_some(Finish {
        activation: target.activation,
        c: target.c.get(),
        pre_activation: target.pre_activation.get(),
    });
    let start = rows.start;
    // SAFETY: rows of the A block and the panel hold `units` units; rows of C hold `cols` values
    // from `column`, inside the part of C that this task owns.
    unsafe {
        run_rows(set, tile, rows.len(), finish, |i| {
            let c = target
                .c
                .get()
                .wrapping_add((start + i) * target.ldc + column);
            (a_block.row(i), c)
        });
    }
}

/// What happens to a tile after its last K block.
#[derive(Clone, Copy)]
pub(crate) struct Finish {
    pub(crate) activation: Activation,
    /// The start of C; rows of `pre_activation` lie where rows of C do.
    pub(crate) c: *mut f32,
    /// Null if the value before the activation is not wanted.
    pub(crate) pre_activation: *mut f32,
}

/// One panel over `count` rows: `row(i)` gives the first unit of row `i` of A and its first value of C.
///
/// # Safety
/// What `row` returns, completed by the other fields of `tile`, must satisfy
/// [`super::kernel::TileFn`].
#[inline]
pub(crate) unsafe fn run_rows(
    set: &KernelSet,
    mut tile: Tile,
    count: usize,
    finish: Option<Finish>,
    row: impl Fn(usize) -> (*const u8, *mut f32),
) {
    let finish = finish
        .filter(|finish| finish.activation != Activation::None || !finish.pre_activation.is_null());
    let mut start = 0;
    while start < count {
        tile.rows = set.rows.min(count - start);
        for i in 0..tile.rows {
            (tile.a[i], tile.c[i]) = row(start + i);
        }
        // SAFETY: the caller's contract.
        unsafe {
            (set.tile)(&tile);
            if let Some(finish) = &finish {
                for i in 0..tile.rows {
                    let c = std::slice::from_raw_parts_mut(tile.c[i], tile.cols);
                    if !finish.pre_activation.is_null() {
                        let at = tile.c[i].offset_from(finish.c);
                        let pre = finish.pre_activation.offset(at);
                        std::ptr::copy_nonoverlapping(c.as_ptr(), pre, tile.cols);
                    }
                    apply_with_isa(set.isa, finish.activation, c);
                }
            }
        }
        start += set.rows;
    }
}

/// How many ranges to cut K into, or `None` where all of B is better packed at once. A weight gradient
/// has a long K and a small C: each thread then packs and multiplies its own range of K into its own
/// copy of C, and nothing is packed twice.
fn k_splits(set: &KernelSet, m: usize, n: usize, k: usize) -> Option<usize> {
    let threads = num_threads();
    let tiles = m.div_ceil(set.rows) * n.div_ceil(LANES * set.vectors);
    // The copies of C are written and summed once per split: worth it if K is several times longer
    // than a copy is wide and high, or if C has too few tiles to occupy the threads.
    let long = k >= 1024 && k >= 2 * m.max(n);
    let few = k >= 512 && tiles < 4 * threads;
    (long || few).then(|| threads.min(k / 256))
}

/// The product as a sum over ranges of K, each computed by one task.
fn split_k(set: &KernelSet, a: MatRef<'_>, b: MatRef<'_>, target: &Target, splits: usize) {
    let (m, n, k) = (target.m, target.n, a.cols());
    let size = m * n;
    // The first range goes straight to C (with the bias); the others to copies, added afterwards.
    let mut copies = Scratch::take((splits - 1) * size * 4);
    let copies = SharedPtr(copies.as_mut_ptr().cast::<f32>());
    par_for(splits, |split| {
        let depth = set.unit.depth();
        let cut = |i: usize| (k / depth * i / splits) * depth;
        let end = if split + 1 == splits {
            k
        } else {
            cut(split + 1)
        };
        let (start, count) = (cut(split), end - cut(split));
        let part_target = if split == 0 {
            Target {
                m,
                n,
                activation: Activation::None,
                pre_activation: SharedPtr(std::ptr::null_mut()),
                ..*target
            }
        } else {
            Target {
                m,
                n,
                c: SharedPtr(copies.get().wrapping_add((split - 1) * size)),
                ldc: n,
                accumulate: false,
                bias: SharedPtr(std::ptr::null_mut()),
                activation: Activation::None,
                pre_activation: SharedPtr(std::ptr::null_mut()),
            }
        };
        // SAFETY: each split writes C or its own copy.
        unsafe {
            serial(
                set,
                a.columns(start, count),
                b.row_range(start, count),
                &part_target,
            );
        }
    });
    let parts = num_threads().min(m);
    par_for(parts, |part| {
        for row in m * part / parts..m * (part + 1) / parts {
            // SAFETY: rows of C and of the copies are disjoint between parts and inside their buffers.
            unsafe {
                let c = std::slice::from_raw_parts_mut(target.c.get().add(row * target.ldc), n);
                for copy in 0..splits - 1 {
                    let from = copies.get().add(copy * size + row * n);
                    let from = std::slice::from_raw_parts(from, n);
                    c.iter_mut().zip(from).for_each(|(c, x)| *c += x);
                }
                if !target.pre_activation.get().is_null() {
                    let pre = target.pre_activation.get().add(row * target.ldc);
                    std::ptr::copy_nonoverlapping(c.as_ptr(), pre, n);
                }
                apply_with_isa(set.isa, target.activation, c);
            }
        }
    });
}

/// A whole product on this thread, packing B one K block at a time so that it stays in L2.
///
/// # Safety
/// Nobody else may touch the C of `target`.
pub(crate) unsafe fn serial(set: &KernelSet, a: MatRef<'_>, b: MatRef<'_>, target: &Target) {
    let layout = Layout::new(set, a.cols(), b.cols());
    let part_rows = target.m.min(2 * BLOCK_ROWS);
    let mut a_scratch = Scratch::take(ABlock::bytes(&layout, part_rows));
    // The first block is the longest.
    let mut b_scratch = Scratch::take(layout.units_of(0) * target.n.next_multiple_of(LANES) * 4);
    for block in 0..layout.blocks() {
        let units = layout.units_of(block);
        let packed = b_scratch.as_mut_ptr().cast::<u32>();
        for panel in 0..layout.panels() {
            let (first, vectors) = layout.panel(panel);
            // SAFETY: the scratch holds one block of all panels.
            unsafe {
                let to = packed.add(first * units * LANES);
                super::pack::pack_panel(set, &layout, &b, block, first, vectors, to);
            }
        }
        for start in (0..target.m).step_by(part_rows) {
            let rows = start..(start + part_rows).min(target.m);
            // SAFETY: the scratch was sized for `part_rows` rows.
            let a_block = unsafe {
                let scratch = a_scratch.as_mut_ptr();
                ABlock::pack(set, &layout, &a, start, rows.len(), block, scratch)
            };
            for panel in 0..layout.panels() {
                let (first, vectors) = layout.panel(panel);
                let place = (block, first, vectors);
                // SAFETY: as this function's contract; the panel was packed above.
                unsafe {
                    let b = packed.add(first * units * LANES).cast::<f32>();
                    run_panel(set, &layout, target, &a_block, rows.clone(), place, b);
                }
            }
        }
    }
}
