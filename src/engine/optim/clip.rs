//! Clipping of gradients by their global norm.

use rayon::prelude::*;

use super::CHUNK;

/// Sum of squares in `f64`, in a fixed order: chunk by chunk, eight running sums within a chunk.
pub fn squared_norm(values: &[f32]) -> f64 {
    let chunks: Vec<f64> = values.par_chunks(CHUNK).map(chunk_squared_norm).collect();
    chunks.iter().sum()
}

fn chunk_squared_norm(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for eight in eights {
        for (lane, &v) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(v) * f64::from(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(v) * f64::from(v);
    }
    lanes.iter().sum()
}

/// Scales `grads` so that their L2 norm is at most `norm_max`; returns the norm before.
///
/// grads *= min(1, norm_max / (norm + 1e-6)). A norm that is not finite leaves them as they are:
/// the caller must not step on it.
pub fn clip_grad_norm(grads: &mut [f32], norm_max: f64) -> f64 {
    let norm = squared_norm(grads).sqrt();
    let scale = norm_max / (norm + 1e-6);
    if scale < 1.0 {
        let scale = scale as f32;
        grads.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|g| *g *= scale));
    }
    norm
}
