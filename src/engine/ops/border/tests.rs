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
