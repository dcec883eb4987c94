//! Anchor points of the grid heads, anchor boxes of RT-DETR, and the clamped logit.

/// The grid of one head level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridLevel {
    /// Pixels of the network input per cell.
    pub stride: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
}

impl GridLevel {
    /// Number of cells.
    pub fn cells(&self) -> usize {
        self.h * self.w
    }
}

/// Number of anchor points over all levels.
pub fn anchor_count(levels: &[GridLevel]) -> usize {
    levels.iter().map(GridLevel::cells).sum()
}

/// Calls `visit(anchor, level, x, y)` for every anchor point, level by level, row-major.
///
/// The point lies at `(x + 0.5, y + 0.5)` in grid units, that times the stride in pixels.
pub fn for_each_anchor(levels: &[GridLevel], mut visit: impl FnMut(usize, &GridLevel, usize, usize)) {
    let mut anchor = 0;
    for level in levels {
        for y in 0..level.h {
            for x in 0..level.w {
                visit(anchor, level, x, y);
                anchor += 1;
            }
        }
    }
}

/// RT-DETR's anchor boxes as logits of cxcywh fractions, and which of them are valid.
///
/// Level `l` (0 = finest), cell (x, y): centre `((x + 0.5)/w, (y + 0.5)/h)`, size `0.05 * 2^l`. An anchor is
/// valid when its four components lie in (0.01, 0.99); the logits of an invalid one are `+inf`.
///
/// # Shapes
/// One entry per cell, levels in order, row-major.
pub fn rtdetr_anchors(shapes_hw: &[(usize, usize)]) -> (Vec<[f32; 4]>, Vec<bool>) {
    let total = shapes_hw.iter().map(|(h, w)| h * w).sum();
    let (mut logits, mut valid) = (Vec::with_capacity(total), Vec::with_capacity(total));
    for (level, &(h, w)) in shapes_hw.iter().enumerate() {
        let size = 0.05 * (level as f32).exp2();
        for y in 0..h {
            for x in 0..w {
                let anchor = [(x as f32 + 0.5) / w as f32, (y as f32 + 0.5) / h as f32, size, size];
                let inside = anchor.iter().all(|&v| v > 0.01 && v < 0.99);
                valid.push(inside);
                logits.push(if inside { anchor.map(|v| (v / (1.0 - v)).ln()) } else { [f32::INFINITY; 4] });
            }
        }
    }
    (logits, valid)
}

/// Clamped logit `ln(max(x, eps) / max(1 - x, eps))` with x first clamped to 0..1 and eps = 1e-5.
pub fn clamped_logit(x: f32) -> f32 {
    let x = x.clamp(0.0, 1.0);
    (x.max(1e-5) / (1.0 - x).max(1e-5)).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rtdetr_anchor_counts_are_those_of_the_specification() {
        let count = |side: usize| {
            let shapes = [8, 16, 32].map(|s| (side / s, side / s));
            let (logits, valid) = rtdetr_anchors(&shapes);
            (logits.len(), valid.iter().filter(|v| **v).count())
        };
        assert_eq!(count(640), (8400, 8084));
        assert_eq!(count(320), (2100, 2100));
    }

    #[test]
    fn anchors_are_visited_row_major() {
        let levels = [GridLevel { stride: 8, h: 2, w: 3 }, GridLevel { stride: 16, h: 1, w: 2 }];
        let mut seen = Vec::new();
        for_each_anchor(&levels, |a, level, x, y| seen.push((a, level.stride, x, y)));
        assert_eq!(seen.len(), anchor_count(&levels));
        assert_eq!(seen[4], (4, 8, 1, 1));
        assert_eq!(seen[7], (7, 16, 1, 0));
    }
}
