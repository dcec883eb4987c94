use super::*;
use crate::engine::tensor::{Dst, View};

#[test]
fn the_border_of_a_whole_buffer_is_cleared_in_runs() {
    let view = View::new(0, 2, 3, 4, 5, 2);
    let mut buffer = vec![7.0; View::storage_len(2, 3, 4, 5, 2)];
    zero(Dst::of(&mut buffer, view));
    assert_eq!(buffer.iter().filter(|&&v| v == 7.0).count(), view.len());
    assert_eq!(buffer[view.at(1, 2, 3)], 7.0);
}

#[test]
fn border_and_inside_are_told_apart() {
    let mut buffer = vec![7.0; View::storage_len(2, 3, 4, 6, 1)];
    let whole = View::new(0, 2, 3, 4, 6, 1);
    let part = whole.slice(1, 2);
    zero(Dst::of(&mut buffer, part));
    let border = 2 * (5 * 6 - 3 * 4) * 2;
    assert_eq!(buffer.iter().filter(|&&v| v == 0.0).count(), border);
    zero_inside(Dst::of(&mut buffer, part));
    assert_eq!(buffer.iter().filter(|&&v| v == 0.0).count(), border + 2 * 3 * 4 * 2);
    assert_eq!(buffer[0], 7.0, "channels outside the slice stay");
}

#[test]
fn the_device_clears_borders_and_insides() {
    use super::cuda::BorderKernels;
    use crate::engine::ops::cuda_testing::{Layout, Map, normals, on_all};
    on_all(|bench| {
        let kernels = BorderKernels::load(&bench.device, bench.precision).expect("kernels");
        for (h, w, c, beyond, pad) in [(3, 4, 8, 0, 1), (5, 2, 5, 1, 2), (1, 1, 24, 8, 3), (4, 4, 16, 8, 0)] {
            let at = Layout::dense(2, h, w, c).within(beyond, pad);
            let map = Map::poisoned(bench, at);
            // SAFETY: the map lives in this test.
            unsafe { kernels.zero(&bench.stream, map.tensor()) }.expect("a launch");
            let inside = map.read_written(bench, pad > 0);
            assert!(inside.iter().all(|v| v.is_nan()), "the inside stays");
            // SAFETY: as above.
            unsafe { kernels.zero_inside(&bench.stream, map.tensor()) }.expect("a launch");
            assert!(map.read_written(bench, pad > 0).iter().all(|v| *v == 0.0));
            let map = Map::of(bench, at, &normals(bench.precision, 1, at.len(), 0.0));
            // SAFETY: as above.
            unsafe { kernels.zero_inside(&bench.stream, map.tensor()) }.expect("a launch");
            assert!(map.read_written(bench, true).iter().all(|v| *v == 0.0));
        }
    });
}
