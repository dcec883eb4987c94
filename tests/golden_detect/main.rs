//! Detection mathematics against the golden vectors: assigner, losses, metrics, suppression, weights.

#[path = "../common/mod.rs"]
mod common;

mod assigner;
mod evaluation;
mod head_loss;
mod head_loss_cuda;
mod pieces;
mod weights;

use common::Golden;

#[test]
fn golden_files_open_and_carry_metadata() {
    for name in ["yolov8_tiny", "assigner", "loss_pieces", "map", "nms", "blocks", "geometry", "optim"] {
        let golden = Golden::open(name);
        assert!(!golden.names().is_empty(), "{name}");
        for array in golden.names() {
            let elements: usize = golden.shape(&array).iter().product();
            assert_eq!(golden.f64(&array).len(), elements, "{name}: {array}");
        }
    }
}
