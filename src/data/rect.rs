//! Rectangular batches: images of like shape together, each batch as small as its shapes allow.

/// The order of images and the input size of each batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RectPlan {
    /// Indices of the images by ascending `height / width`.
    pub order: Vec<u32>,
    /// Height and width of the input of each batch of `batch` images in that order.
    pub shapes: Vec<(usize, usize)>,
}

/// Plans batches for images of the given (height, width).
///
/// With ratios `height / width` of a batch: all below 1 gives (largest ratio, 1), all above 1 gives (1, 1 / smallest
/// ratio), else (1, 1); the shape is `ceil(side * imgsz / stride + pad) * stride`. Validation pads by 0.5, training by 0.
pub fn plan(sizes_hw: &[(u32, u32)], batch: usize, imgsz: usize, stride: usize, pad: f64) -> RectPlan {
    let ratio = |i: u32| {
        let (h, w) = sizes_hw[i as usize];
        f64::from(h) / f64::from(w)
    };
    let mut order: Vec<u32> = (0..sizes_hw.len() as u32).collect();
    order.sort_by(|&a, &b| ratio(a).total_cmp(&ratio(b)));
    let shapes = order
        .chunks(batch.max(1))
        .map(|images| {
            let (smallest, largest) = (ratio(images[0]), ratio(images[images.len() - 1]));
            let (h, w) = if largest < 1.0 {
                (largest, 1.0)
            } else if smallest > 1.0 {
                (1.0, 1.0 / smallest)
            } else {
                (1.0, 1.0)
            };
            let side = |share: f64| (share * imgsz as f64 / stride as f64 + pad).ceil() as usize * stride;
            (side(h).max(stride), side(w).max(stride))
        })
        .collect();
    RectPlan { order, shapes }
}
