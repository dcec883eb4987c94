//! Detection mathematics against the golden vectors: assigner, losses, metrics, suppression, weights.

mod common;

use common::Golden;

#[test]
fn golden_files_open_and_carry_metadata() {
    for name in ["yolov8_tiny", "assigner", "loss_pieces", "map", "nms", "blocks"] {
        let golden = Golden::open(name);
        assert!(!golden.names().is_empty(), "{name}");
        assert!(golden.meta_f64("seed").is_finite(), "{name}");
        for array in golden.names() {
            let elements: usize = golden.shape(&array).iter().product();
            if golden.dtype(&array) != "BOOL" {
                assert_eq!(golden.f64(&array).len(), elements, "{name}: {array}");
            }
        }
    }
}
