//! Every tolerance of the golden tests, one line and one reason each.

/// Allowed difference `atol + rtol * |expected|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub atol: f64,
    pub rtol: f64,
}

const fn tolerance(atol: f64, rtol: f64) -> Tolerance {
    Tolerance { atol, rtol }
}

// Whole models (reduced YOLOv8).
/// Feature maps and raw head outputs: f32 rounding through about sixty layers.
pub const MODEL_FORWARD: Tolerance = tolerance(1e-4, 0.0);
/// Decoded boxes in pixels: strides of up to 32 enlarge the forward error.
pub const MODEL_BOXES_PX: Tolerance = tolerance(1e-3, 0.0);
/// Loss items from stored head outputs: sums of f32 terms in another order.
pub const LOSS: Tolerance = tolerance(0.0, 1e-5);
/// Loss items after the model's own forward pass: the forward error enters once more.
pub const MODEL_LOSS: Tolerance = tolerance(0.0, 1e-5);
/// Parameter gradients of a whole model, relative L2 per tensor: batch statistics amplify rounding.
pub const MODEL_GRADIENT_REL_L2: f64 = 5e-4;
/// Floor of the gradient norm as a share of the global norm: tensors with vanishing gradient hold only rounding.
pub const MODEL_GRADIENT_FLOOR: f64 = 1e-4;
/// Running statistics after one training pass: averages of f32 activations.
pub const RUNNING_STATISTICS: Tolerance = tolerance(1e-5, 1e-4);

// Single blocks.
/// Block outputs: a few layers of f32 rounding.
pub const BLOCK_FORWARD: Tolerance = tolerance(1e-5, 0.0);
/// Block gradients, relative L2: batch statistics over few elements.
pub const BLOCK_GRADIENT_REL_L2: f64 = 1e-4;

// Assigner and loss pieces.
/// Soft target scores: one division of f32 products with a sixth power.
pub const ASSIGNER_SCORES: Tolerance = tolerance(1e-5, 0.0);
/// Loss pieces: closed formulas in f32.
pub const PIECE: Tolerance = tolerance(1e-5, 1e-5);
/// IoU of nearly degenerate boxes: the quotient of two tiny areas.
pub const IOU_DEGENERATE: Tolerance = tolerance(2e-4, 2e-4);
/// Total cost of an assignment: sums in f64 of the same f32 entries.
pub const ASSIGNMENT_TOTAL: Tolerance = tolerance(1e-9, 1e-12);

// Evaluation.
/// Metrics: f64 accumulation of the same counts.
pub const METRIC: Tolerance = tolerance(1e-9, 1e-9);
/// Curves are stored in f32.
pub const METRIC_CURVE: Tolerance = tolerance(1e-6, 1e-6);
/// Suppressed boxes are copies of decoded boxes: one rounding of centre plus half size.
pub const NMS_BOXES_PX: Tolerance = tolerance(1e-4, 1e-6);

// Geometry and images.
/// Boxes through letterbox, warp and mosaic, pixels.
pub const GEOMETRY_BOXES_PX: Tolerance = tolerance(1e-3, 0.0);
/// Affine matrices in f64, composed in another order.
pub const GEOMETRY_MATRIX: Tolerance = tolerance(1e-5, 1e-5);
/// Resized and warped images, grey levels: fixed-point against float interpolation.
pub const IMAGE_LEVELS: u8 = 1;

// Optimisers.
/// One step of SGD or Adam in f32.
pub const OPTIMISER: Tolerance = tolerance(1e-5, 0.0);
/// Norm of all gradients: kept in f32, whose rounding grows with the value.
pub const GRADIENT_NORM: Tolerance = tolerance(1e-5, 1e-6);
/// MuSGD: the reference iterates in bfloat16.
pub const OPTIMISER_MUSGD: Tolerance = tolerance(3e-4, 0.0);
/// Schedules are f64 formulas.
pub const SCHEDULE: Tolerance = tolerance(1e-9, 1e-9);

// Sixteen-bit storage on a GPU, against the f32 reference.
/// Loss items: activations rounded to 8 bits of mantissa at each of about sixty layers.
pub const HALF_LOSS: Tolerance = tolerance(0.0, 3e-2);
/// Head outputs, relative L2: rounding of every layer adds up.
pub const HALF_OUTPUT_REL_L2: f64 = 5e-2;
/// All gradients as one vector, relative L2, 11 bits of mantissa: batch statistics over few pixels amplify rounding
/// about fifty times in this network (f32 against f64: 4e-6 at a rounding of 6e-8). Found 0.024.
pub const F16_GRADIENT_REL_L2: f64 = 0.05;
/// The same with 8 bits: sixteen times the rounding. Found 0.39, through the very code that gives 0.024 with 11 bits.
pub const BF16_GRADIENT_REL_L2: f64 = 0.6;
