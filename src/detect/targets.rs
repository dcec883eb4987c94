//! The labelled boxes of a batch.

/// One labelled box of a batch. A batch lists its boxes grouped by image, images ascending.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Index of the image within the batch.
    pub image: u32,
    /// Class index, `0..nc`.
    pub class: u32,
    /// Centre and size as fractions of the network input's width and height, each in 0..1.
    pub cxcywh: [f32; 4],
}
