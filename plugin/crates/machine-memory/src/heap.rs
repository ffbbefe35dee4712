//! Where a program's large blocks of memory come from.
//!
//! A step of learning takes and frees gigabytes, and the next step the same again. Memory that goes back to the system in
//! between has to be asked for anew, page by page, and in pages of 4 KiB half of the time goes into looking up where they are,
//! the more so in a virtual machine. So large blocks come from spans of pages of 2 MiB, for which Linux waits to be asked
//! (`madvise`, the default of most distributions), and while work goes on that says so ([`keep_freed`]) what it frees is
//! kept. Small blocks are the system allocator's.
#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes from which on a block is large.
const LARGE: usize = 32 << 10;
/// And up to which: the table of a span of such blocks is a small block.
const MOST: usize = 16 << 30;
/// What sizes of large blocks are rounded up to, and the greatest alignment that they have.
const GRAIN: usize = 4 << 10;
/// Bytes of a large page, on most processors.
const PAGE: usize = 2 << 20;
/// Bytes of a span, where a block does not need more. What nobody has touched yet takes no memory.
const SPAN: usize = 256 << 20;

/// An allocator for `#[global_allocator]`: large blocks of memory on large pages.
#[derive(Debug, Default, Clone, Copy)]
pub struct Heap;

static SPANS: Mutex<Spans> = Mutex::new(Spans::new());
static KEEPERS: AtomicUsize = AtomicUsize::new(0);

/// While one of these is alive, freed memory stays with the process.
#[derive(Debug)]
#[must_use = "freed memory is kept for as long as this lives"]
pub struct KeepFreed(());

/// Keeps what is freed from now on for the blocks that follow, if [`Heap`] is the program's allocator.
pub fn keep_freed() -> KeepFreed {
    KEEPERS.fetch_add(1, Ordering::Relaxed);
    KeepFreed(())
}

impl Drop for KeepFreed {
    fn drop(&mut self) {
        if KEEPERS.fetch_sub(1, Ordering::Relaxed) == 1 {
            spans().give_back();
        }
    }
}

fn spans() -> MutexGuard<'static, Spans> {
    SPANS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_large(layout: Layout) -> bool {
    (LARGE..MOST).contains(&layout.size()) && layout.align() <= GRAIN
}

// SAFETY: large blocks are disjoint parts of mapped spans, others the system allocator's own; which one a block is from is
// known by its layout and, as the system's stands in where there is no span to be had, by its address.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let block = is_large(layout).then(|| spans().take(rounded(layout.size())));
        match block.flatten() {
            Some(address) => std::ptr::with_exposed_provenance_mut(address),
            // SAFETY: as the caller vouches.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !(is_large(layout) && spans().put_back(block.addr(), rounded(layout.size()))) {
            // SAFETY: as the caller vouches; it is in none of the spans.
            unsafe { System.dealloc(block, layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout) {
            // SAFETY: as the caller vouches.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: as the caller vouches; a block is as long as its layout says.
        unsafe {
            let block = self.alloc(layout);
            if !block.is_null() {
                block.write_bytes(0, layout.size());
            }
            block
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as the caller vouches: not zero, and not beyond isize when rounded up.
        let wanted = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        match [layout, wanted].map(is_large) {
            // SAFETY: as the caller vouches; neither is in a span.
            [false, false] => unsafe { System.realloc(block, layout, bytes) },
            [true, true]
                if rounded(bytes) == rounded(layout.size()) && spans().has(block.addr()) =>
            {
                block
            }
            // SAFETY: as the caller vouches; the new block is another one, and both are as long as what is copied.
            _ => unsafe {
                let other = self.alloc(wanted);
                if !other.is_null() {
                    other.copy_from_nonoverlapping(block, bytes.min(layout.size()));
                    self.dealloc(block, layout);
                }
                other
            },
        }
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(GRAIN)
}

/// Mapped memory, and what of it is free. Its own tables are small blocks.
struct Spans {
    /// By first byte.
    mapped: BTreeMap<usize, Span>,
    free: BTreeMap<usize, usize>,
    /// Length and first byte of what is free: the least that is enough is taken, and the first of those.
    by_length: BTreeSet<(usize, usize)>,
}

struct Span {
    length: usize,
    /// Of every large page whether it takes memory, or may.
    is_there: Vec<bool>,
}

impl Spans {
    const fn new() -> Self {
        Self {
            mapped: BTreeMap::new(),
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
        }
    }

    /// The address of a block, if there is memory.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (length, start) = self.fitting(bytes).or_else(|| {
            self.map(bytes)?;
            self.fitting(bytes)
        })?;
        self.forget(start, length);
        if length > bytes {
            self.note(start + bytes, length - bytes);
        }
        let n_new = self.touch(start, bytes);
        if n_new > 0 {
            self.exchange(n_new);
        }
        Some(start)
    }

    /// Pages of a block that take memory from now on.
    fn touch(&mut self, start: usize, bytes: usize) -> usize {
        let Some((&first, span)) = self.mapped.range_mut(..=start).next_back() else {
            return 0;
        };
        let pages = (start - first) / PAGE..(start + bytes - first).div_ceil(PAGE);
        let pages = &mut span.is_there[pages];
        let n_new = pages.iter().filter(|is_there| !**is_there).count();
        pages.fill(true);
        n_new
    }

    /// Gives back so many pages that lie between blocks, where none of those that were wanted fitted: a program that keeps
    /// what it frees takes little more memory than it holds at its highest.
    fn exchange(&mut self, mut n_pages: usize) {
        let mut next = (PAGE, 0);
        while n_pages > 0
            && let Some(&(length, start)) = self.by_length.range(next..).next()
        {
            next = (length, start + 1);
            let pages = start.next_multiple_of(PAGE)..(start + length) / PAGE * PAGE;
            for page in pages.step_by(PAGE) {
                if n_pages > 0 && self.leave(page, page + PAGE) > 0 {
                    n_pages -= 1;
                }
            }
        }
    }

    /// Gives back the whole large pages between two addresses of a span, which are free; returns how many were there.
    fn leave(&mut self, start: usize, end: usize) -> usize {
        let Some((&first, span)) = self.mapped.range_mut(..=start).next_back() else {
            return 0;
        };
        let (from, to) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
        if from >= to {
            return 0;
        }
        let pages = &mut span.is_there[(from - first) / PAGE..(to - first) / PAGE];
        let n_there = pages.iter().filter(|is_there| **is_there).count();
        if n_there > 0 {
            pages.fill(false);
            give_back(from, to);
        }
        n_there
    }

    fn fitting(&self, bytes: usize) -> Option<(usize, usize)> {
        self.by_length.range((bytes, 0)..).next().copied()
    }

    fn map(&mut self, bytes: usize) -> Option<()> {
        let whole = bytes.next_multiple_of(PAGE);
        // What a limit to the address space leaves may still be enough for the block alone.
        let (start, length) = [whole.max(SPAN), whole]
            .into_iter()
            .find_map(|length| Some((map(length)?, length)))?;
        let is_there = vec![false; length / PAGE];
        self.mapped.insert(start, Span { length, is_there });
        // Spans that lie side by side are not joined: their blocks come back to one of them.
        self.note(start, length);
        Some(())
    }

    /// Whether this address is in one of the spans.
    fn has(&self, address: usize) -> bool {
        self.span(address).is_some()
    }

    fn span(&self, address: usize) -> Option<(usize, usize)> {
        let (&start, span) = self.mapped.range(..=address).next_back()?;
        (address < start + span.length).then_some((start, start + span.length))
    }

    /// Takes a block back, if it is in one of the spans.
    fn put_back(&mut self, address: usize, bytes: usize) -> bool {
        let Some((first, last)) = self.span(address) else {
            return false;
        };
        let (mut start, mut end) = (address, address + bytes);
        if let Some((&before, &length)) = self.free.range(first..start).next_back()
            && before + length == start
        {
            self.forget(before, length);
            start = before;
        }
        if end < last
            && let Some(&length) = self.free.get(&end)
        {
            self.forget(end, length);
            end += length;
        }
        self.note(start, end - start);
        if KEEPERS.load(Ordering::Relaxed) == 0 {
            // Of what was free already, no more than the pages that the block was in.
            let touched = [
                address / PAGE * PAGE,
                (address + bytes).next_multiple_of(PAGE),
            ];
            self.leave(start.max(touched[0]), end.min(touched[1]));
        }
        true
    }

    fn give_back(&mut self) {
        let mut next = 0;
        while let Some((&start, &length)) = self.free.range(next..).next() {
            next = start + 1;
            self.leave(start, start + length);
        }
    }

    fn note(&mut self, start: usize, length: usize) {
        self.free.insert(start, length);
        self.by_length.insert((length, start));
    }

    fn forget(&mut self, start: usize, length: usize) {
        self.free.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

/// So many bytes from the system, beginning at a large page.
#[cfg(target_os = "linux")]
fn map(length: usize) -> Option<usize> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let around = length.checked_add(PAGE)?;
    // SAFETY: asks for new memory, and gives back those parts of it that are before and after the pages.
    unsafe {
        let mapped = libc::mmap(std::ptr::null_mut(), around, protection, flags, -1, 0);
        if mapped == libc::MAP_FAILED {
            return None;
        }
        let first = mapped.expose_provenance();
        let start = first.next_multiple_of(PAGE);
        let after = start + length;
        if start > first {
            libc::munmap(mapped, start - first);
        }
        if first + around > after {
            libc::munmap(
                std::ptr::with_exposed_provenance_mut(after),
                first + around - after,
            );
        }
        // Without such pages small ones do.
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(start),
            length,
            libc::MADV_HUGEPAGE,
        );
        Some(start)
    }
}

/// Gives the large pages between two addresses, which are free, back to the system until they are touched again.
#[cfg(target_os = "linux")]
fn give_back(start: usize, end: usize) {
    let pages = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: nobody has a block there; what was in them is lost. An error means that they stay.
    unsafe { libc::madvise(pages, end - start, libc::MADV_DONTNEED) };
}

/// Elsewhere the system's allocator has all blocks.
#[cfg(not(target_os = "linux"))]
fn map(_length: usize) -> Option<usize> {
    None
}

#[cfg(not(target_os = "linux"))]
fn give_back(_start: usize, _end: usize) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Pseudo-random numbers below `n`.
    fn draw(state: &mut u64, n: usize) -> usize {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (*state >> 33) as usize % n
    }

    #[test]
    fn blocks_keep_what_is_in_them_and_all_of_it_comes_back() {
        let mut state = 7;
        let mut blocks: Vec<(*mut u8, Layout, u8)> = Vec::new();
        for round in 0..4000 {
            let size = 1 + draw(
                &mut state,
                if round % 50 == 0 { 40 << 20 } else { 300 << 10 },
            );
            let align = 1 << draw(&mut state, 7);
            let layout = Layout::from_size_align(size, align).expect("a layout");
            // SAFETY: layouts are of more than nothing, and blocks are freed once, with theirs.
            unsafe {
                if draw(&mut state, 2) == 0 && !blocks.is_empty() {
                    let (block, layout, mark) = blocks.swap_remove(draw(&mut state, blocks.len()));
                    let bytes = std::slice::from_raw_parts(block, layout.size());
                    assert!(bytes.iter().step_by(997).all(|byte| *byte == mark));
                    if draw(&mut state, 3) == 0 {
                        let block = Heap.realloc(block, layout, size);
                        let kept = size.min(layout.size());
                        let bytes = std::slice::from_raw_parts_mut(block, size);
                        assert!(bytes[..kept].iter().step_by(997).all(|byte| *byte == mark));
                        bytes.fill(mark);
                        let layout = Layout::from_size_align(size, layout.align());
                        blocks.push((block, layout.expect("a layout"), mark));
                    } else {
                        Heap.dealloc(block, layout);
                    }
                }
                let zeroed = draw(&mut state, 4) == 0;
                let block = if zeroed {
                    Heap.alloc_zeroed(layout)
                } else {
                    Heap.alloc(layout)
                };
                assert!(!block.is_null() && block.addr().is_multiple_of(align));
                let bytes = std::slice::from_raw_parts_mut(block, size);
                assert!(!zeroed || bytes.iter().all(|byte| *byte == 0));
                bytes.fill(round as u8);
                blocks.push((block, layout, round as u8));
                if blocks.len() > 60 {
                    let (block, layout, _) = blocks.swap_remove(draw(&mut state, 60));
                    Heap.dealloc(block, layout);
                }
            }
        }
        let _kept = keep_freed();
        for (block, layout, _) in blocks {
            // SAFETY: as above.
            unsafe { Heap.dealloc(block, layout) };
        }
        // Neighbors are one again: every span is free as a whole.
        let spans = spans();
        let mapped = spans.mapped.iter();
        let mapped: BTreeMap<_, _> = mapped.map(|(first, span)| (*first, span.length)).collect();
        assert_eq!(spans.free, mapped);
        let by_length: BTreeSet<_> = spans
            .free
            .iter()
            .map(|(start, length)| (*length, *start))
            .collect();
        assert_eq!(spans.by_length, by_length);
    }
}
