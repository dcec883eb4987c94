//! Copy-paste (Ghiasi et al., "Simple copy-paste is a strong data augmentation method", CVPR 2021).
//!
//! It pastes objects along their outlines. A detection dataset holds boxes and no outlines (polygon labels are reduced
//! to boxes when they are read), so in the published recipe the step leaves such data unchanged. That is what happens
//! here too, and [`note`] says so instead of doing it in silence.

use super::AugmentArgs;

/// What to tell a user who asked for copy-paste; `None` when the key is 0.
pub fn note(args: &AugmentArgs) -> Option<String> {
    (args.copy_paste > 0.0).then(|| {
        format!(
            "copy_paste: {} has no effect: it needs object outlines, and detection labels are boxes",
            args.copy_paste
        )
    })
}
