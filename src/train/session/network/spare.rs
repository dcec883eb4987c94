//! Room for gradients that nobody wants.

use crate::detect::decode::HeadLevel;
use crate::detect::losses::detection::HeadLevelGrad;

/// Room for the gradients that the loss writes and validation does not want.
#[derive(Default)]
pub struct Spare {
    floats: Vec<f32>,
}

impl Spare {
    pub(super) fn grads(&mut self, levels: &[HeadLevel]) -> Vec<HeadLevelGrad<'_>> {
        let len = levels.iter().map(|l| l.boxes.len() + l.scores.len()).sum();
        if self.floats.len() < len {
            self.floats.resize(len, 0.0);
        }
        let mut rest = self.floats.as_mut_slice();
        let mut grads = Vec::with_capacity(levels.len());
        for level in levels {
            let (boxes, after) = rest.split_at_mut(level.boxes.len());
            let (scores, after) = after.split_at_mut(level.scores.len());
            rest = after;
            grads.push(HeadLevelGrad { boxes, scores });
        }
        grads
    }
}
