//! Random perspective: the matrix, and what it does to boxes.

use super::{AugmentArgs, PixelBox};
use crate::engine::rng::Rng;

/// Boxes no wider or no higher than this after the warp are dropped, pixels.
const SIDE_MIN: f64 = 2.0;
/// Boxes that keep no more than this part of their area are dropped.
const AREA_RATIO_MIN: f64 = 0.10;
/// Boxes at least this elongated are dropped.
const ASPECT_MAX: f64 = 100.0;
/// Keeps quotients finite.
const EPS: f64 = 1e-16;

/// A homogeneous transform of the plane, rows first.
pub type Matrix = [[f64; 3]; 3];

/// The eight numbers of one random perspective, in the order they are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerspectiveDraws {
    /// Perspective term of x.
    pub perspective_x: f64,
    /// Perspective term of y.
    pub perspective_y: f64,
    /// Rotation, degrees, counter-clockwise.
    pub angle: f64,
    /// Zoom.
    pub scale: f64,
    /// Shear of x along y, degrees.
    pub shear_x: f64,
    /// Shear of y along x, degrees.
    pub shear_y: f64,
    /// Place of the input's centre, fraction of the output's width.
    pub translate_x: f64,
    /// Place of the input's centre, fraction of the output's height.
    pub translate_y: f64,
}

impl PerspectiveDraws {
    /// Draws all eight, each whether its range is empty or not.
    pub fn draw(args: &AugmentArgs, rng: &mut Rng) -> PerspectiveDraws {
        let mut around = |centre: f64, reach: f64| {
            let u = rng.uniform();
            // An empty range gives its centre exactly, so an unrotated image stays axis-aligned to the bit.
            if reach == 0.0 { centre } else { centre + reach * (2.0 * u - 1.0) }
        };
        let (low, high) = args.scale.interval();
        PerspectiveDraws {
            perspective_x: around(0.0, args.perspective),
            perspective_y: around(0.0, args.perspective),
            angle: around(0.0, args.degrees),
            scale: around((low + high) / 2.0, (high - low) / 2.0),
            shear_x: around(0.0, args.shear),
            shear_y: around(0.0, args.shear),
            translate_x: around(0.5, args.translate),
            translate_y: around(0.5, args.translate),
        }
    }

    /// The transform from an input of `in_hw` to an output of `out_hw`: `M = T S R P C`.
    ///
    /// C moves the input's centre to the origin, P is the identity with bottom row (px, py, 1), R rotates and zooms,
    /// S shears, T moves the origin to (translate_x * width, translate_y * height) of the output.
    pub fn matrix(&self, in_hw: (usize, usize), out_hw: (usize, usize)) -> Matrix {
        let centre =
            [[1.0, 0.0, -(in_hw.1 as f64) / 2.0], [0.0, 1.0, -(in_hw.0 as f64) / 2.0], [0.0, 0.0, 1.0]];
        let perspective = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [self.perspective_x, self.perspective_y, 1.0]];
        let (sin, cos) = self.angle.to_radians().sin_cos();
        let (sin, cos) = (sin * self.scale, cos * self.scale);
        let rotation = [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]];
        let (shear_x, shear_y) = (self.shear_x.to_radians().tan(), self.shear_y.to_radians().tan());
        let shear = [[1.0, shear_x, 0.0], [shear_y, 1.0, 0.0], [0.0, 0.0, 1.0]];
        let (tx, ty) = (self.translate_x * out_hw.1 as f64, self.translate_y * out_hw.0 as f64);
        let translation = [[1.0, 0.0, tx], [0.0, 1.0, ty], [0.0, 0.0, 1.0]];
        [translation, shear, rotation, perspective, centre]
            .into_iter()
            .reduce(|left, right| product(&left, &right))
            .expect("five matrices")
    }
}

/// `a * b`.
fn product(a: &Matrix, b: &Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

/// The inverse by cofactors; `None` when the determinant vanishes.
pub fn inverse(m: &Matrix) -> Option<Matrix> {
    let cofactor = |i: usize, j: usize| {
        let (r0, r1, c0, c1) = ((i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3);
        m[r0][c0] * m[r1][c1] - m[r0][c1] * m[r1][c0]
    };
    let determinant: f64 = (0..3).map(|j| m[0][j] * cofactor(0, j)).sum();
    if !determinant.is_normal() {
        return None;
    }
    Some(std::array::from_fn(|i| std::array::from_fn(|j| cofactor(j, i) / determinant)))
}

/// Moves a box through the transform: the smallest upright box around its four corners, clipped to the output.
pub fn transform_box(matrix: &Matrix, b: &PixelBox, out_hw: (usize, usize)) -> PixelBox {
    let [x1, y1, x2, y2] = b.xyxy.map(f64::from);
    let corners = [(x1, y1), (x2, y2), (x1, y2), (x2, y1)].map(|(x, y)| {
        let at = |row: &[f64; 3]| row[0] * x + row[1] * y + row[2];
        // Without perspective the last row is (0, 0, 1) and the quotient is exact.
        let w = at(&matrix[2]);
        (at(&matrix[0]) / w, at(&matrix[1]) / w)
    });
    let fold = |pick: fn(&(f64, f64)) -> f64, best: fn(f64, f64) -> f64| {
        corners.iter().map(pick).reduce(best).expect("four corners") as f32
    };
    let xyxy =
        [fold(|c| c.0, f64::min), fold(|c| c.1, f64::min), fold(|c| c.0, f64::max), fold(|c| c.1, f64::max)];
    PixelBox { class: b.class, xyxy }.clipped(out_hw.1 as f32, out_hw.0 as f32)
}

/// Whether a warped box is still worth learning: sides above 2 px, more than a tenth of the area that zooming alone
/// would have given, and less than 100 times longer than wide.
pub fn keeps(before: &PixelBox, after: &PixelBox, scale: f64) -> bool {
    let [x1, y1, x2, y2] = before.xyxy.map(|v| f64::from(v) * scale);
    let old_area = (x2 - x1) * (y2 - y1);
    let [x1, y1, x2, y2] = after.xyxy.map(f64::from);
    let (w, h) = (x2 - x1, y2 - y1);
    let aspect = (w / (h + EPS)).max(h / (w + EPS));
    w > SIDE_MIN && h > SIDE_MIN && w * h / (old_area + EPS) > AREA_RATIO_MIN && aspect < ASPECT_MAX
}

/// Moves all boxes through the transform and drops those that [`keeps`] refuses, in place.
pub fn transform_boxes(matrix: &Matrix, scale: f64, out_hw: (usize, usize), boxes: &mut Vec<PixelBox>) {
    boxes.retain_mut(|b| {
        let moved = transform_box(matrix, b, out_hw);
        let keep = keeps(b, &moved, scale);
        *b = moved;
        keep
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rng::Use;

    #[test]
    fn inverse_undoes() {
        let mut rng = Rng::new(5, Use::Test, 0, 0);
        let args = AugmentArgs { degrees: 40.0, shear: 10.0, perspective: 0.001, ..AugmentArgs::default() };
        for _ in 0..50 {
            let m = PerspectiveDraws::draw(&args, &mut rng).matrix((96, 128), (64, 64));
            let p = product(&m, &inverse(&m).expect("regular"));
            for (i, row) in p.iter().enumerate() {
                for (j, v) in row.iter().enumerate() {
                    assert!((v - f64::from(u8::from(i == j))).abs() < 1e-9, "{p:?}");
                }
            }
        }
        assert_eq!(inverse(&[[0.0; 3]; 3]), None);
    }

    #[test]
    fn defaults_stay_axis_aligned() {
        let mut rng = Rng::new(6, Use::Test, 0, 0);
        let m = PerspectiveDraws::draw(&AugmentArgs::default(), &mut rng).matrix((640, 640), (320, 320));
        assert_eq!([m[0][1], m[1][0], m[2][0], m[2][1], m[2][2]], [0.0, 0.0, 0.0, 0.0, 1.0]);
    }
}
