//! MixUp (Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018): two samples blended.

use crate::engine::rng::Rng;

/// Draws the share of the first image from Beta(32, 32).
pub fn draw_ratio(rng: &mut Rng) -> f64 {
    rng.beta(32.0, 32.0)
}

/// `image = floor(ratio * image + (1 - ratio) * partner)`; the labels of both are kept by the caller.
pub fn blend(image: &mut [u8], partner: &[u8], ratio: f64) {
    assert_eq!(image.len(), partner.len(), "images of one size");
    let other = 1.0 - ratio;
    for (a, &b) in image.iter_mut().zip(partner) {
        *a = (f64::from(*a) * ratio + f64::from(b) * other) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blends_and_truncates() {
        let mut a = [100, 0, 255];
        blend(&mut a, &[201, 255, 255], 0.5);
        assert_eq!(a, [150, 127, 255]);
    }
}
