//! One allocation for everything that a plan needs.

use crate::engine::error::EngineError;

/// 64 bytes, so that the allocation is aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: sixteen floats without padding; zero bits are zeros.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bits are valid floats.
unsafe impl bytemuck::Pod for Line {}

/// Zeroed floats, aligned to 64 bytes.
pub(super) struct Arena {
    lines: Vec<Line>,
}

impl Arena {
    /// Room for `floats` numbers.
    pub fn new(floats: usize) -> Result<Arena, EngineError> {
        let count = floats.div_ceil(16);
        let lines = bytemuck::allocation::try_zeroed_vec(count)
            .map_err(|()| EngineError::OutOfMemory { needed_bytes: count * 64 })?;
        let mut arena = Arena { lines };
        arena.ask_for_huge_pages();
        Ok(arena)
    }

    /// Asks for 2 MiB pages where the system gives them on request: large sweeps then miss the address cache
    /// far less often. A refusal changes nothing but speed, so it is not looked at.
    fn ask_for_huge_pages(&mut self) {
        #[cfg(target_os = "linux")]
        {
            const HUGE_PAGE: usize = 2 << 20;
            let (start, bytes) = (self.base() as usize, self.len() * 4);
            let (from, to) = (start.next_multiple_of(HUGE_PAGE), (start + bytes) / HUGE_PAGE * HUGE_PAGE);
            if from < to {
                // SAFETY: whole pages inside our own allocation; the advice does not change their contents.
                unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_HUGEPAGE) };
            }
        }
    }

    pub fn len(&self) -> usize {
        self.lines.len() * 16
    }

    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.lines)
    }

    pub fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Start of the numbers, to be written by one pass at a time.
    pub fn base(&mut self) -> *mut f32 {
        self.lines.as_mut_ptr().cast()
    }
}
