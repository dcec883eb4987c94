//! Comparisons that name the array, the worst index and both values.

use super::tolerances::Tolerance;

/// Requires `|a - e| <= atol + rtol * |e|` for every element; equal infinities agree, NaN never does.
#[track_caller]
pub fn assert_close(name: &str, actual: &[f32], expected: &[f32], tolerance: Tolerance) {
    assert_eq!(actual.len(), expected.len(), "{name}: number of elements differs");
    let mut worst: Option<(usize, f64)> = None;
    for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let ratio = excess(a as f64, e as f64, tolerance);
        if worst.is_none_or(|(_, w)| ratio > w) {
            worst = Some((index, ratio));
        }
    }
    if let Some((index, ratio)) = worst
        && ratio > 1.0
    {
        let bad = actual
            .iter()
            .zip(expected)
            .filter(|(a, e)| excess(**a as f64, **e as f64, tolerance) > 1.0)
            .count();
        panic!(
            "{name}: {bad} of {} elements outside {tolerance:?}; worst at {index}: got {}, expected {} ({ratio:.3} times the tolerance)",
            actual.len(),
            actual[index],
            expected[index],
        );
    }
}

/// As [`assert_close`], for double precision.
#[track_caller]
pub fn assert_close_f64(name: &str, actual: &[f64], expected: &[f64], tolerance: Tolerance) {
    assert_eq!(actual.len(), expected.len(), "{name}: number of elements differs");
    for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let ratio = excess(a, e, tolerance);
        assert!(ratio <= 1.0, "{name}[{index}]: got {a}, expected {e} ({ratio:.3} times {tolerance:?})");
    }
}

/// Requires one number to be within the tolerance.
#[track_caller]
pub fn assert_scalar_close(name: &str, actual: f64, expected: f64, tolerance: Tolerance) {
    assert_close_f64(name, &[actual], &[expected], tolerance);
}

/// How many times the tolerance the difference is; infinite for a NaN.
fn excess(actual: f64, expected: f64, tolerance: Tolerance) -> f64 {
    if actual == expected {
        return 0.0;
    }
    let allowed = tolerance.atol + tolerance.rtol * expected.abs();
    let ratio = (actual - expected).abs() / allowed;
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// Requires `||a - e|| <= limit * max(||e||, floor)`; the floor keeps arrays of zeros comparable.
#[track_caller]
pub fn assert_rel_l2(name: &str, actual: &[f32], expected: &[f32], limit: f64, floor: f64) {
    let relative = rel_l2(name, actual, expected, floor);
    if relative <= limit {
        return;
    }
    let (index, _) = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e).abs())
        .enumerate()
        .fold((0, -1.0f32), |best, (i, d)| if d > best.1 || d.is_nan() { (i, d) } else { best });
    panic!(
        "{name}: relative L2 difference {relative:.3e} above {limit:.3e}; worst at {index}: got {}, expected {}",
        actual[index], expected[index]
    );
}

/// `||a - e|| / max(||e||, floor)`, infinite when a value is NaN.
#[track_caller]
pub fn rel_l2(name: &str, actual: &[f32], expected: &[f32], floor: f64) -> f64 {
    assert_eq!(actual.len(), expected.len(), "{name}: number of elements differs");
    let difference: f64 = actual.iter().zip(expected).map(|(&a, &e)| (a as f64 - e as f64).powi(2)).sum();
    if difference == 0.0 {
        return 0.0;
    }
    let norm: f64 = expected.iter().map(|&e| (e as f64).powi(2)).sum();
    let relative = difference.sqrt() / norm.sqrt().max(floor);
    if relative.is_nan() { f64::INFINITY } else { relative }
}

/// Requires equal values, naming the first that differs.
#[track_caller]
pub fn assert_exact<T: PartialEq + std::fmt::Debug>(name: &str, actual: &[T], expected: &[T]) {
    assert_eq!(actual.len(), expected.len(), "{name}: number of elements differs");
    for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a == e, "{name}[{index}]: got {a:?}, expected {e:?}");
    }
}
