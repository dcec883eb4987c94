//! Offsets by lifetime: buffers that are never alive together may share bytes.

/// Floats of alignment of every buffer: one cache line.
const ALIGN: usize = 16;

/// A buffer to place: how long, and from which to which time it is in use (both inclusive).
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub len: usize,
    pub first: usize,
    pub last: usize,
    /// Filled by [`place`].
    pub start: usize,
}

impl Request {
    pub fn new(len: usize, first: usize, last: usize) -> Request {
        Request { len, first, last, start: usize::MAX }
    }

    fn alive_with(&self, other: &Request) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Places every buffer and returns the floats of the arena: largest first, each at the lowest place free
/// during its whole life. Not optimal, but within a few percent on these graphs, and deterministic.
pub(crate) fn place(requests: &mut [Request]) -> usize {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(requests[i].len), requests[i].first, i));
    let mut placed: Vec<usize> = Vec::with_capacity(order.len());
    let mut total = 0;
    for i in order {
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| requests[j].alive_with(&requests[i]))
            .map(|&j| (requests[j].start, requests[j].start + requests[j].len))
            .collect();
        taken.sort_unstable();
        let mut start = 0;
        for (from, to) in taken {
            if start + requests[i].len <= from {
                break;
            }
            start = start.max(to.next_multiple_of(ALIGN));
        }
        requests[i].start = start;
        total = total.max(start + requests[i].len);
        placed.push(i);
    }
    total.next_multiple_of(ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn living_buffers_never_overlap(list in proptest::collection::vec((1usize..500, 0usize..40, 0usize..40), 1..60)) {
            let mut requests: Vec<Request> =
                list.iter().map(|&(len, a, b)| Request::new(len, a.min(b), a.max(b))).collect();
            let total = place(&mut requests);
            for (i, a) in requests.iter().enumerate() {
                prop_assert!(a.start % ALIGN == 0 && a.start + a.len <= total);
                for b in &requests[..i] {
                    let apart = a.start + a.len <= b.start || b.start + b.len <= a.start;
                    prop_assert!(apart || !a.alive_with(b));
                }
            }
        }
    }
}
