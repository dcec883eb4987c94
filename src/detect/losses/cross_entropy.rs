//! Cross-entropy of the classification models.

/// Mean of `-ln softmax(logits)[class]` over the rows; `gradient` is overwritten with its derivative.
///
/// # Shapes
/// `logits` and `gradient` are `[rows][nc]`, `classes` has one entry per row. No rows: loss 0.
pub fn cross_entropy(logits: &[f32], classes: &[usize], nc: usize, gradient: &mut [f32]) -> f32 {
    assert_eq!(logits.len(), classes.len() * nc, "one row of nc logits per class");
    assert_eq!(logits.len(), gradient.len(), "one gradient per logit");
    if classes.is_empty() {
        return 0.0;
    }
    let share = 1.0 / classes.len() as f32;
    let mut total = 0.0f64;
    for ((row, out), &class) in logits.chunks_exact(nc).zip(gradient.chunks_exact_mut(nc)).zip(classes) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| (*x as f64 - max as f64).exp()).sum();
        let log_sum = sum.ln() + max as f64;
        total += log_sum - row[class] as f64;
        for (d, x) in out.iter_mut().zip(row) {
            *d = share * (*x as f64 - log_sum).exp() as f32;
        }
        out[class] -= share;
    }
    (total / classes.len() as f64) as f32
}
