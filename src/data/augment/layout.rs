//! Where everything of a sample goes: canvases, transforms, boxes; no pixel is needed for it.

use super::mosaic::PatchRect;
use super::perspective::Matrix;
use super::plan::{BasePlan, SamplePlan};
use super::{PixelBox, cutmix, flip, mosaic, perspective};

/// Height and width of an image of the split, scaled for the network input.
pub type SizeOf<'a> = &'a dyn Fn(u32) -> (usize, usize);
/// Boxes of an image of the split in pixels of the image scaled to a height and a width.
pub type BoxesOf<'a> = &'a dyn Fn(u32, usize, usize) -> Vec<PixelBox>;

/// A canvas (a mosaic or a single image) and how it comes to the network input.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseLayout {
    /// Height and width of the canvas.
    pub canvas_hw: (usize, usize),
    /// Where the images of the plan lie on it, in their order.
    pub patches: Vec<PatchRect>,
    /// From the canvas to the network input.
    pub matrix: Matrix,
    /// Boxes on the network input, pixels.
    pub boxes: Vec<PixelBox>,
}

impl BaseLayout {
    /// Lays out the images of a plan, whose sizes (height, width) are given in their order.
    pub fn new(
        plan: &BasePlan,
        imgsz: usize,
        out_hw: (usize, usize),
        sizes: &[(usize, usize)],
        boxes_of: BoxesOf,
    ) -> BaseLayout {
        let (canvas_hw, patches, mut boxes) = match plan.mosaic_centre {
            Some(centre) => {
                let (mut patches, mut boxes) = (Vec::with_capacity(4), Vec::new());
                for (position, (&(h, w), &index)) in sizes.iter().zip(&plan.images).enumerate() {
                    let rect = mosaic::place(position, centre, h, w, imgsz);
                    mosaic::append_boxes(&rect, imgsz, &boxes_of(index, h, w), &mut boxes);
                    patches.push(rect);
                }
                ((2 * imgsz, 2 * imgsz), patches, boxes)
            }
            None => {
                let (h, w) = sizes[0];
                let rect = PatchRect { dest: [0, 0, w, h], source: [0, 0] };
                ((h, w), vec![rect], boxes_of(plan.images[0], h, w))
            }
        };
        let matrix = plan.perspective.matrix(canvas_hw, out_hw);
        perspective::transform_boxes(&matrix, plan.perspective.scale, out_hw, &mut boxes);
        BaseLayout { canvas_hw, patches, matrix, boxes }
    }
}

/// All of a sample, as [`super::Composer`] makes it.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleLayout {
    /// The sample's own.
    pub own: BaseLayout,
    /// What is blended in.
    pub mixed: Option<BaseLayout>,
    /// What is pasted, and where: left, top, right, bottom before any flip. `None` also where cutmix was drawn and no
    /// place was free.
    pub pasted: Option<(BaseLayout, [usize; 4])>,
    /// The boxes of the finished sample, pixels.
    pub boxes: Vec<PixelBox>,
}

impl SampleLayout {
    /// Lays out a planned sample.
    pub fn new(
        plan: &SamplePlan,
        imgsz: usize,
        out_hw: (usize, usize),
        size_of: SizeOf,
        boxes_of: BoxesOf,
    ) -> SampleLayout {
        let base = |plan: &BasePlan| {
            let sizes: Vec<_> = plan.images.iter().map(|&index| size_of(index)).collect();
            BaseLayout::new(plan, imgsz, out_hw, &sizes, boxes_of)
        };
        let own = base(&plan.base);
        let mut boxes = own.boxes.clone();
        let mixed = plan.mixup.as_ref().map(|(partner, _)| base(partner));
        boxes.extend(mixed.iter().flat_map(|partner| &partner.boxes));
        let pasted = plan.cutmix.as_ref().and_then(|(partner, draws)| {
            let partner = base(partner);
            let rect = cutmix::decide(draws, &mut boxes, &partner.boxes)?;
            Some((partner, rect))
        });
        if plan.flip_vertical {
            flip::vertical_boxes(out_hw.0, &mut boxes);
        }
        if plan.flip_horizontal {
            flip::horizontal_boxes(out_hw.1, &mut boxes);
        }
        SampleLayout { own, mixed, pasted, boxes }
    }
}
