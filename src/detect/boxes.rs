//! Boxes: conversions between corner and centre form, and the intersection-over-union family with gradients.
//!
//! `xyxy` is (left, top, right, bottom), `cxcywh` is (centre x, centre y, width, height).

/// Guards every division of the family and the height of a box in corner form.
const EPS: f32 = 1e-7;
/// `4 / pi^2`, the factor of the aspect-ratio term.
const ASPECT_FACTOR: f32 = 4.0 / (std::f32::consts::PI * std::f32::consts::PI);

/// Which member of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IouKind {
    /// Intersection over union.
    Iou,
    /// Generalised IoU: minus the empty share of the smallest enclosing box (Rezatofighi et al. 2019).
    Giou,
    /// Distance IoU: minus the squared centre distance over the squared enclosing diagonal (Zheng et al. 2020).
    Diou,
    /// Complete IoU: distance IoU minus a weighted difference of aspect ratios (Zheng et al. 2020).
    Ciou,
}

/// Centre form to corner form.
#[inline]
pub fn cxcywh_to_xyxy(b: [f32; 4]) -> [f32; 4] {
    let (half_w, half_h) = (b[2] / 2.0, b[3] / 2.0);
    [b[0] - half_w, b[1] - half_h, b[0] + half_w, b[1] + half_h]
}

/// Corner form to centre form.
#[inline]
pub fn xyxy_to_cxcywh(b: [f32; 4]) -> [f32; 4] {
    [(b[0] + b[2]) / 2.0, (b[1] + b[3]) / 2.0, b[2] - b[0], b[3] - b[1]]
}

/// Plain IoU for evaluation: `I / (area1 + area2 - I + 1e-7)`, no guard in the sides.
#[inline]
pub fn box_iou(a: [f32; 4], b: [f32; 4]) -> f32 {
    let w = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let h = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let intersection = w * h;
    let area_a = (a[2] - a[0]) * (a[3] - a[1]);
    let area_b = (b[2] - b[0]) * (b[3] - b[1]);
    intersection / (area_a + area_b - intersection + EPS)
}

/// Corners plus the sides that the formulas use (they differ from the corners' differences by the guard).
#[derive(Clone, Copy)]
struct Sides {
    corners: [f32; 4],
    w: f32,
    h: f32,
}

impl Sides {
    #[inline(always)]
    fn from_xyxy(b: [f32; 4]) -> Sides {
        Sides { corners: b, w: b[2] - b[0], h: b[3] - b[1] + EPS }
    }

    #[inline(always)]
    fn from_cxcywh(b: [f32; 4]) -> Sides {
        Sides { corners: cxcywh_to_xyxy(b), w: b[2], h: b[3] }
    }
}

/// The member `kind` of the family for two boxes in corner form.
///
/// # Numerics
/// f32 throughout; `1e-7` is added to the heights, the union, the enclosing area and the enclosing diagonal.
#[inline]
pub fn iou_xyxy(kind: IouKind, a: [f32; 4], b: [f32; 4]) -> f32 {
    value(kind, Sides::from_xyxy(a), Sides::from_xyxy(b))
}

/// The member `kind` of the family for two boxes in centre form; sides are taken as given, without guard.
#[inline]
pub fn iou_cxcywh(kind: IouKind, a: [f32; 4], b: [f32; 4]) -> f32 {
    value(kind, Sides::from_cxcywh(a), Sides::from_cxcywh(b))
}

/// Value and gradient with respect to the corners of `a`.
///
/// # Gradient
/// The weight `alpha` of the aspect term is a constant; where two edges coincide each box takes half.
pub fn iou_xyxy_gradient(kind: IouKind, a: [f32; 4], b: [f32; 4]) -> (f32, [f32; 4]) {
    let g = gradient(kind, Sides::from_xyxy(a), Sides::from_xyxy(b));
    let c = g.corners;
    (g.value, [c[0] - g.w, c[1] - g.h, c[2] + g.w, c[3] + g.h])
}

/// Value and gradient with respect to centre and size of `a`; see [`iou_xyxy_gradient`].
pub fn iou_cxcywh_gradient(kind: IouKind, a: [f32; 4], b: [f32; 4]) -> (f32, [f32; 4]) {
    let g = gradient(kind, Sides::from_cxcywh(a), Sides::from_cxcywh(b));
    let c = g.corners;
    (g.value, [c[0] + c[2], c[1] + c[3], (c[2] - c[0]) / 2.0 + g.w, (c[3] - c[1]) / 2.0 + g.h])
}

#[inline(always)]
fn value(kind: IouKind, a: Sides, b: Sides) -> f32 {
    let (p, q) = (a.corners, b.corners);
    let intersection =
        (p[2].min(q[2]) - p[0].max(q[0])).max(0.0) * (p[3].min(q[3]) - p[1].max(q[1])).max(0.0);
    let union = a.w * a.h + b.w * b.h - intersection + EPS;
    let iou = intersection / union;
    if kind == IouKind::Iou {
        return iou;
    }
    let cw = p[2].max(q[2]) - p[0].min(q[0]);
    let ch = p[3].max(q[3]) - p[1].min(q[1]);
    if kind == IouKind::Giou {
        let enclosing = cw * ch + EPS;
        return iou - (enclosing - union) / enclosing;
    }
    let diagonal = cw * cw + ch * ch + EPS;
    let dx = q[0] + q[2] - p[0] - p[2];
    let dy = q[1] + q[3] - p[1] - p[3];
    let distance = (dx * dx + dy * dy) / 4.0;
    if kind == IouKind::Diou {
        return iou - distance / diagonal;
    }
    let angle = (b.w / b.h).atan() - (a.w / a.h).atan();
    let v = ASPECT_FACTOR * angle * angle;
    let alpha = v / (v - iou + (1.0 + EPS));
    iou - (distance / diagonal + v * alpha)
}

/// Gradient by corner (as plain coordinates) and by the sides `w`, `h` as the formulas use them.
struct Gradient {
    value: f32,
    corners: [f32; 4],
    w: f32,
    h: f32,
}

/// Share of `d min(a, b) / d a`: one half where both are equal.
#[inline(always)]
fn share_of_min(a: f32, b: f32) -> f32 {
    if a < b {
        1.0
    } else if a == b {
        0.5
    } else {
        0.0
    }
}

fn gradient(kind: IouKind, a: Sides, b: Sides) -> Gradient {
    let (p, q) = (a.corners, b.corners);
    // Intersection. A width of exactly zero still passes its gradient.
    let raw_w = p[2].min(q[2]) - p[0].max(q[0]);
    let raw_h = p[3].min(q[3]) - p[1].max(q[1]);
    let (iw, ih) = (raw_w.max(0.0), raw_h.max(0.0));
    let pass_w = if raw_w >= 0.0 { 1.0 } else { 0.0 };
    let pass_h = if raw_h >= 0.0 { 1.0 } else { 0.0 };
    let intersection = iw * ih;
    let d_intersection = [
        -pass_w * share_of_min(q[0], p[0]) * ih,
        -pass_h * share_of_min(q[1], p[1]) * iw,
        pass_w * share_of_min(p[2], q[2]) * ih,
        pass_h * share_of_min(p[3], q[3]) * iw,
    ];
    let union = a.w * a.h + b.w * b.h - intersection + EPS;
    let iou = intersection / union;
    // d(I/U) = dI/U - I/U^2 dU with dU = d(w h) - dI.
    let by_intersection = (1.0 + iou) / union;
    let by_area = -iou / union;
    let mut g = Gradient {
        value: iou,
        corners: d_intersection.map(|d| d * by_intersection),
        w: by_area * a.h,
        h: by_area * a.w,
    };
    if kind == IouKind::Iou {
        return g;
    }
    let cw = p[2].max(q[2]) - p[0].min(q[0]);
    let ch = p[3].max(q[3]) - p[1].min(q[1]);
    let d_enclosing = [
        -share_of_min(p[0], q[0]),
        -share_of_min(p[1], q[1]),
        share_of_min(q[2], p[2]),
        share_of_min(q[3], p[3]),
    ];
    if kind == IouKind::Giou {
        // GIoU = IoU - 1 + U/C.
        let enclosing = cw * ch + EPS;
        g.value = iou - (enclosing - union) / enclosing;
        for (corner, d) in g.corners.iter_mut().zip(d_intersection) {
            *corner -= d / enclosing;
        }
        g.w += a.h / enclosing;
        g.h += a.w / enclosing;
        let by_enclosing = -union / (enclosing * enclosing);
        for (i, corner) in g.corners.iter_mut().enumerate() {
            *corner += by_enclosing * d_enclosing[i] * if i % 2 == 0 { ch } else { cw };
        }
        return g;
    }
    let diagonal = cw * cw + ch * ch + EPS;
    let delta = [q[0] + q[2] - p[0] - p[2], q[1] + q[3] - p[1] - p[3]];
    let distance = (delta[0] * delta[0] + delta[1] * delta[1]) / 4.0;
    for (i, corner) in g.corners.iter_mut().enumerate() {
        let side = if i % 2 == 0 { cw } else { ch };
        let d_distance = -delta[i % 2] / 2.0;
        let d_diagonal = 2.0 * side * d_enclosing[i];
        *corner -= (d_distance - distance / diagonal * d_diagonal) / diagonal;
    }
    if kind == IouKind::Diou {
        g.value = iou - distance / diagonal;
        return g;
    }
    let angle = (b.w / b.h).atan() - (a.w / a.h).atan();
    let v = ASPECT_FACTOR * angle * angle;
    let alpha = v / (v - iou + (1.0 + EPS));
    g.value = iou - (distance / diagonal + v * alpha);
    let by_angle = 2.0 * alpha * ASPECT_FACTOR * angle / (a.w * a.w + a.h * a.h);
    g.w += by_angle * a.h;
    g.h -= by_angle * a.w;
    g
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_box() -> impl Strategy<Value = [f32; 4]> {
        (-50.0f32..50.0, -50.0f32..50.0, 0.5f32..60.0, 0.5f32..60.0)
            .prop_map(|(x, y, w, h)| [x, y, x + w, y + h])
    }

    const KINDS: [IouKind; 4] = [IouKind::Iou, IouKind::Giou, IouKind::Diou, IouKind::Ciou];

    proptest! {
        #[test]
        fn family_is_symmetric_and_in_range(a in any_box(), b in any_box()) {
            for kind in KINDS {
                let (ab, ba) = (iou_xyxy(kind, a, b), iou_xyxy(kind, b, a));
                prop_assert!((ab - ba).abs() < 1e-4, "{kind:?} {ab} {ba}");
                let low = match kind { IouKind::Iou => 0.0, IouKind::Ciou => -2.0, _ => -1.0 };
                prop_assert!(ab >= low - 1e-4 && ab <= 1.0 + 1e-5, "{kind:?} {ab}");
                prop_assert!((iou_xyxy(kind, a, a) - 1.0).abs() < 1e-4);
            }
            prop_assert!((box_iou(a, b) - iou_xyxy(IouKind::Iou, a, b)).abs() < 1e-4);
        }

        #[test]
        fn both_forms_agree(a in any_box(), b in any_box()) {
            let (ac, bc) = (xyxy_to_cxcywh(a), xyxy_to_cxcywh(b));
            for kind in KINDS {
                prop_assert!((iou_xyxy(kind, a, b) - iou_cxcywh(kind, ac, bc)).abs() < 1e-4);
            }
            for (x, y) in cxcywh_to_xyxy(ac).iter().zip(a) {
                prop_assert!((x - y).abs() < 1e-4);
            }
        }

        #[test]
        fn gradient_of_iou_and_giou_and_diou_matches_differences(a in any_box(), b in any_box()) {
            for kind in [IouKind::Iou, IouKind::Giou, IouKind::Diou] {
                let (value, gradient) = iou_xyxy_gradient(kind, a, b);
                prop_assert!((value - iou_xyxy(kind, a, b)).abs() < 1e-6);
                for i in 0..4 {
                    // Where an edge of one box passes an edge of the other the function has a corner.
                    let step = 0.02f32;
                    if (a[i] - b[i]).abs() < 2.0 * step || (a[i] - b[i ^ 2]).abs() < 2.0 * step {
                        continue;
                    }
                    let (mut up, mut down) = (a, a);
                    up[i] += step;
                    down[i] -= step;
                    let difference = (iou_xyxy(kind, up, b) - iou_xyxy(kind, down, b)) / (up[i] - down[i]);
                    prop_assert!((difference - gradient[i]).abs() < 2e-3 + 0.02 * gradient[i].abs(),
                        "{kind:?} {i} {difference} {}", gradient[i]);
                }
            }
        }
    }
}
