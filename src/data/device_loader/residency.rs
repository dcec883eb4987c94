//! Which decoded images lie where in the device's memory.
//!
//! When all fit, each has its place for good. Otherwise the first to come are kept for good and the rest of the memory
//! is a ring in which the oldest images make room. Keeping some for good matters: every epoch shows every image once in
//! a new order, and of a plain ring that holds 60 % of them only 23 % would be found again.

use std::collections::{BTreeMap, HashMap};

/// Every image begins at a multiple of this.
const ALIGNMENT: u64 = 16;

/// Places of images, in bytes from the beginning of the memory.
#[derive(Debug)]
pub(super) struct Residency {
    /// Below: kept for good. Above, up to `end`: the ring.
    kept_end: u64,
    end: u64,
    kept_next: u64,
    ring_next: u64,
    places: HashMap<u32, Place>,
    /// Images of the ring by place.
    ring: BTreeMap<u64, u32>,
    /// Places for good whose image was given up before it came.
    holes: HashMap<u32, u64>,
    bytes: u64,
    evictions: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    bytes: u64,
    /// Number of the last batch that needs it.
    last_use: u64,
}

/// What became of an image that a batch needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It is there.
    Here(u64),
    /// It belongs here and must be brought.
    Bring(u64),
}

impl Found {
    /// The place.
    pub fn offset(self) -> u64 {
        match self {
            Found::Here(offset) | Found::Bring(offset) => offset,
        }
    }
}

/// Bytes that an image takes.
pub(super) fn footprint(height: usize, width: usize) -> u64 {
    ((height * width * 3) as u64).next_multiple_of(ALIGNMENT)
}

impl Residency {
    /// `kept` bytes for good and a ring of `ring` bytes.
    pub fn new(kept: u64, ring: u64) -> Residency {
        let kept = kept / ALIGNMENT * ALIGNMENT;
        Residency {
            kept_end: kept,
            end: kept + ring / ALIGNMENT * ALIGNMENT,
            kept_next: 0,
            ring_next: kept,
            places: HashMap::new(),
            ring: BTreeMap::new(),
            holes: HashMap::new(),
            bytes: 0,
            evictions: 0,
        }
    }

    /// Finds or makes a place for an image of `bytes` bytes that batch `batch` needs. Images needed by batches from
    /// `launched` on stay. `None` when there is no room then.
    pub fn place(&mut self, image: u32, bytes: u64, batch: u64, launched: u64) -> Option<Found> {
        if let Some(place) = self.places.get_mut(&image) {
            place.last_use = batch;
            return Some(Found::Here(place.offset));
        }
        let offset = match self.holes.remove(&image) {
            Some(offset) => offset,
            None if self.kept_next + bytes <= self.kept_end => {
                self.kept_next += bytes;
                self.kept_next - bytes
            }
            None => self.place_in_ring(image, bytes, launched)?,
        };
        self.bytes += bytes;
        self.places.insert(image, Place { offset, bytes, last_use: batch });
        Some(Found::Bring(offset))
    }

    /// The next piece of the ring without an image that must stay; images in it are given up. What lies ahead of
    /// `ring_next` is older than what lies behind, and no image reaches across it.
    fn place_in_ring(&mut self, image: u32, bytes: u64, launched: u64) -> Option<u64> {
        let (mut at, mut wraps) = (self.ring_next, 0);
        loop {
            if at + bytes > self.end {
                (at, wraps) = (self.kept_end, wraps + 1);
                if wraps == 2 || at + bytes > self.end {
                    return None;
                }
            }
            let mut inside = self.ring.range(at..at + bytes).rev().map(|(_, image)| self.places[image]);
            match inside.find(|place| place.last_use >= launched) {
                Some(place) => at = place.offset + place.bytes,
                None => break,
            }
        }
        let gone: Vec<u64> = self.ring.range(at..at + bytes).map(|(&offset, _)| offset).collect();
        for offset in gone {
            if let Some(image) = self.ring.remove(&offset) {
                self.remove(image);
                self.evictions += 1;
            }
        }
        self.ring.insert(at, image);
        self.ring_next = at + bytes;
        Some(at)
    }

    /// Whether a place is one for good.
    pub fn is_kept(&self, offset: u64) -> bool {
        offset < self.kept_end
    }

    /// Gives up an image that was to be brought and will not be.
    pub fn forget(&mut self, image: u32) {
        if let Some(place) = self.remove(image) {
            if self.is_kept(place.offset) {
                self.holes.insert(image, place.offset);
            } else {
                self.ring.remove(&place.offset);
            }
        }
    }

    /// Empties the ring.
    pub fn clear_ring(&mut self) {
        for image in std::mem::take(&mut self.ring).into_values() {
            self.remove(image);
            self.evictions += 1;
        }
        self.ring_next = self.kept_end;
    }

    fn remove(&mut self, image: u32) -> Option<Place> {
        let place = self.places.remove(&image)?;
        self.bytes -= place.bytes;
        Some(place)
    }

    /// Empties everything.
    pub fn clear(&mut self) {
        self.clear_ring();
        self.places.clear();
        self.holes.clear();
        (self.kept_next, self.bytes) = (0, 0);
    }

    /// Images given up so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Bytes of the images that have a place.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rng::{Rng, Use};

    #[test]
    fn images_of_batches_in_hand_never_move_and_never_overlap() {
        let mut rng = Rng::new(41, Use::Test, 0, 0);
        for round in 0..20 {
            let (kept, ring) = (rng.below(3) as u64 * 500, 4000 + rng.below(2000) as u64);
            let mut residency = Residency::new(kept, ring);
            let mut in_hand: Vec<Vec<(u32, u64, u64)>> = Vec::new();
            let (mut planned, mut launched, mut cleared) = (0u64, 0u64, 0);
            for _ in 0..300 {
                let mut batch: Vec<(u32, u64, u64)> = Vec::new();
                let mut wanted: Vec<u32> = (0..1 + rng.below(8)).map(|_| rng.below(40) as u32).collect();
                wanted.sort_unstable();
                wanted.dedup();
                let mut i = 0;
                while i < wanted.len() {
                    let image = wanted[i];
                    let bytes = footprint(4 + image as usize % 7, 5 + image as usize % 11);
                    match residency.place(image, bytes, planned, launched) {
                        Some(found) => {
                            batch.push((image, found.offset(), bytes));
                            i += 1;
                        }
                        None if launched < planned => launched += 1,
                        None => {
                            residency.clear_ring();
                            batch.clear();
                            (i, cleared) = (0, cleared + 1);
                        }
                    }
                }
                planned += 1;
                in_hand.push(batch);
                if planned - launched > 2 {
                    launched += 1;
                }
                let mut all: Vec<_> = in_hand[launched as usize..].iter().flatten().copied().collect();
                all.sort_by_key(|&(image, offset, _)| (offset, image));
                all.dedup();
                for pair in all.windows(2) {
                    assert!(pair[0].1 + pair[0].2 <= pair[1].1, "round {round}: {pair:?}");
                }
                assert!(all.iter().all(|&(_, offset, bytes)| offset + bytes <= residency.end));
                for (image, offset, _) in all {
                    assert_eq!(residency.places[&image].offset, offset);
                }
            }
            assert!(residency.evictions() > 0);
            assert!(cleared < 20, "{cleared} times no room");
        }
    }

    #[test]
    fn what_is_kept_stays_and_a_hole_is_filled_again() {
        let mut residency = Residency::new(96, 64);
        for image in 0..2 {
            assert_eq!(residency.place(image, 48, 0, 0), Some(Found::Bring(48 * u64::from(image))));
        }
        assert_eq!(residency.place(2, 48, 0, 0), Some(Found::Bring(96)));
        assert_eq!(residency.place(3, 48, 0, 0), None, "batch 0 is in hand");
        assert_eq!(residency.place(3, 48, 1, 1), Some(Found::Bring(96)));
        assert_eq!((residency.evictions(), residency.bytes()), (1, 144));
        residency.forget(0);
        assert_eq!(residency.place(0, 48, 2, 2), Some(Found::Bring(0)));
        assert_eq!(residency.place(1, 48, 2, 2), Some(Found::Here(48)));
        residency.clear();
        assert_eq!(residency.bytes(), 0);
    }
}
