//! Views into the arena: where a tensor lies and how to step through it.
//!
//! Activations are `f32`, NHWC. A channel slice is a view with the pitch of its parent, so `concat`
//! and `split` cost nothing. A buffer may carry a border of `pad` zero pixels on all four sides, so
//! that a 3x3 convolution reads past the edge without a check. `offset` points at pixel (0, 0) of
//! image 0, *inside* the border; the border lies at negative coordinates and past the end.

use std::marker::PhantomData;

/// Where a `[n, h, w, c]` tensor lies in a buffer of `f32`. All pitches are counted in floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct View {
    /// Index of element (0, 0, 0, 0).
    pub offset: usize,
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels of this view.
    pub c: usize,
    /// From one pixel to the next in a row: the channels of the parent buffer.
    pub pixel_pitch: usize,
    /// From one row to the next: `(w + 2 * pad) * pixel_pitch`.
    pub row_pitch: usize,
    /// From one image to the next: `(h + 2 * pad) * row_pitch`.
    pub image_pitch: usize,
    /// Zero pixels kept on each side.
    pub pad: usize,
}

impl View {
    /// A dense view of `[n, h, w, c]` with a border of `pad` pixels whose storage begins at `start`.
    pub fn new(start: usize, n: usize, h: usize, w: usize, c: usize, pad: usize) -> View {
        let row_pitch = (w + 2 * pad) * c;
        View {
            offset: start + pad * row_pitch + pad * c,
            n,
            h,
            w,
            c,
            pixel_pitch: c,
            row_pitch,
            image_pitch: (h + 2 * pad) * row_pitch,
            pad,
        }
    }

    /// Floats that the storage of such a dense view takes, border included.
    pub fn storage_len(n: usize, h: usize, w: usize, c: usize, pad: usize) -> usize {
        n * (h + 2 * pad) * (w + 2 * pad) * c
    }

    /// The channels `from..from + len` of this view.
    pub fn slice(&self, from: usize, len: usize) -> View {
        assert!(from + len <= self.c, "channels {from}..{} of {}", from + len, self.c);
        View { offset: self.offset + from, c: len, ..*self }
    }

    /// Index of element `(n, y, x, 0)`; `y` and `x` may reach `pad` pixels outside the map.
    pub fn at(&self, n: usize, y: isize, x: isize) -> usize {
        let base = (self.offset + n * self.image_pitch) as isize;
        (base + y * self.row_pitch as isize + x * self.pixel_pitch as isize) as usize
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.n * self.h * self.w * self.c
    }

    /// True when there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when the elements lie one after another with nothing between.
    pub fn is_dense(&self) -> bool {
        self.pad == 0 && self.pixel_pitch == self.c
    }
}

/// A tensor to read: a view and the buffer it lies in.
#[derive(Clone, Copy)]
pub struct Src<'a> {
    /// First float of the buffer (add `view.offset`).
    pub data: *const f32,
    /// Where the tensor lies.
    pub view: View,
    marker: PhantomData<&'a [f32]>,
}

/// A tensor to write: a view and the buffer it lies in.
///
/// Several `Src` and `Dst` may lie in one buffer (the arena); an operation writes only elements of
/// its `Dst` views, and the plan guarantees that those are not read by anyone else meanwhile.
#[derive(Clone, Copy)]
pub struct Dst<'a> {
    /// First float of the buffer (add `view.offset`).
    pub data: *mut f32,
    /// Where the tensor lies.
    pub view: View,
    marker: PhantomData<&'a mut [f32]>,
}

// SAFETY: both are plain addresses plus a layout. Every access through them is `unsafe` and argues
// for itself that no two threads write one element or read what another writes.
unsafe impl Send for Src<'_> {}
unsafe impl Sync for Src<'_> {}
unsafe impl Send for Dst<'_> {}
unsafe impl Sync for Dst<'_> {}

impl<'a> Src<'a> {
    /// A tensor to read.
    ///
    /// # Safety
    /// For all of `'a`, every element of `view` and its border lies in the allocation of `data`,
    /// and nobody writes them.
    pub unsafe fn new(data: *const f32, view: View) -> Src<'a> {
        Src { data, view, marker: PhantomData }
    }

    /// A tensor in a slice; checks the bounds.
    pub fn of(buffer: &'a [f32], view: View) -> Src<'a> {
        assert!(last_index(&view) < buffer.len(), "{view:?} ends past {} floats", buffer.len());
        Src { data: buffer.as_ptr(), view, marker: PhantomData }
    }
}

impl<'a> Dst<'a> {
    /// A tensor to write.
    ///
    /// # Safety
    /// For all of `'a`, every element of `view` and its border lies in the allocation of `data`,
    /// and nobody else reads or writes them.
    pub unsafe fn new(data: *mut f32, view: View) -> Dst<'a> {
        Dst { data, view, marker: PhantomData }
    }

    /// A tensor in a slice; checks the bounds.
    pub fn of(buffer: &'a mut [f32], view: View) -> Dst<'a> {
        assert!(last_index(&view) < buffer.len(), "{view:?} ends past {} floats", buffer.len());
        Dst { data: buffer.as_mut_ptr(), view, marker: PhantomData }
    }

    /// The same tensor, to read.
    pub fn as_src(&self) -> Src<'a> {
        Src { data: self.data, view: self.view, marker: PhantomData }
    }
}

/// Index of the last float that the view or its border touches.
fn last_index(v: &View) -> usize {
    let (y, x) = ((v.h + v.pad) as isize - 1, (v.w + v.pad) as isize - 1);
    v.at(v.n.saturating_sub(1), y, x) + v.c.saturating_sub(1)
}
