//! Lattice points by their coordinates, and the numbers that a band of features gives to those it touches.

/// Most vertices a simplex can have: a key packs eight 16-bit lanes.
pub(super) const MAX_VERTICES: usize = 8;

/// Coordinates of a lattice point, 16 bits each, biased to be unsigned. The last of the d + 1 is left out, as all
/// sum to zero. Because no lane ever leaves its range, adding packed keys adds their coordinates, and a step keeps
/// the order of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PointKey(u128);

const BIAS: i32 = 1 << 15;

/// One in each of the first D lanes.
const fn ones<const D: usize>() -> u128 {
    let mut ones = 0;
    let mut lane = 0;
    while lane < D {
        ones |= 1 << (16 * lane);
        lane += 1;
    }
    ones
}

impl PointKey {
    /// Packs the first D coordinates, each within 16 bits signed.
    pub(super) fn new<const D: usize>(coordinates: &[i32; MAX_VERTICES]) -> Self {
        let mut packed = 0;
        for (lane, &c) in coordinates[..D].iter().enumerate() {
            packed |= u128::from((c + BIAS) as u16) << (16 * lane);
        }
        Self(packed)
    }

    /// The neighbor with every coordinate one higher, except `axis`, which is D lower.
    pub(super) fn step<const D: usize>(self, axis: usize) -> Self {
        let raised = self.0.wrapping_add(ones::<D>());
        Self(if axis < D {
            raised.wrapping_sub((D as u128 + 1) << (16 * axis))
        } else {
            raised
        })
    }

    #[cfg(test)]
    pub(super) fn coordinates<const D: usize>(self) -> [i32; D] {
        std::array::from_fn(|lane| i32::from((self.0 >> (16 * lane)) as u16) - BIAS)
    }

    fn hash(self) -> u64 {
        let folded = self.0 as u64 ^ ((self.0 >> 64) as u64).rotate_left(29);
        let mixed = folded.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^ (mixed >> 32)
    }
}

/// One place of the hash table; number 0 is an empty one.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The low bits of the hash: they tell most other keys apart without fetching one.
    tag: u32,
    number: u32,
}

/// Open-addressing hash map that numbers keys from 1 in order of first appearance.
#[derive(Debug)]
pub(super) struct PointIndex {
    keys: Vec<PointKey>,
    slots: Vec<Slot>,
    /// The top bits of the hash choose the slot.
    shift: u32,
}

impl PointIndex {
    pub(super) fn new() -> Self {
        const BITS: u32 = 12;
        Self {
            keys: Vec::new(),
            slots: vec![Slot::default(); 1 << BITS],
            shift: 64 - BITS,
        }
    }

    /// The keys in the order of their numbers.
    pub(super) fn into_keys(self) -> Vec<PointKey> {
        self.keys
    }

    /// The number of `key`, a new one if it has none.
    pub(super) fn number(&mut self, key: PointKey) -> u32 {
        let place = self.place_of(key);
        if self.slots[place].number != 0 {
            return self.slots[place].number;
        }
        self.keys.push(key);
        let number = self.keys.len() as u32;
        self.slots[place] = Slot {
            tag: key.hash() as u32,
            number,
        };
        // At most half full, so that probes stay short.
        if self.keys.len() * 2 > self.slots.len() {
            self.grow();
        }
        number
    }

    /// The index of the slot that holds `key`, or of the empty one where it belongs.
    fn place_of(&self, key: PointKey) -> usize {
        let (hash, mask) = (key.hash(), self.slots.len() - 1);
        let mut place = (hash >> self.shift) as usize;
        loop {
            let Slot { tag, number } = self.slots[place];
            if number == 0 || (tag == hash as u32 && self.keys[number as usize - 1] == key) {
                return place;
            }
            place = (place + 1) & mask;
        }
    }

    fn grow(&mut self) {
        self.shift -= 2;
        self.slots = vec![Slot::default(); self.slots.len() * 4];
        for number in 1..=self.keys.len() {
            let key = self.keys[number - 1];
            let place = self.place_of(key);
            self.slots[place] = Slot {
                tag: key.hash() as u32,
                number: number as u32,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_add_to_coordinates_without_carries() {
        let key = PointKey::new::<5>(&[0, -1, 1, -30_000, 30_000, 0, 0, 0]);
        assert_eq!(key.coordinates::<5>(), [0, -1, 1, -30_000, 30_000]);
        assert_eq!(
            key.step::<5>(1).coordinates::<5>(),
            [1, -6, 2, -29_999, 30_001]
        );
        assert_eq!(
            key.step::<5>(5).coordinates::<5>(),
            [1, 0, 2, -29_999, 30_001]
        );
        let around = (0..=5).fold(key, PointKey::step::<5>);
        assert_eq!(around, key, "one step along each axis returns");
    }

    #[test]
    fn steps_keep_the_order_of_keys() {
        let mut keys: Vec<_> = (0..500)
            .map(|i: i32| {
                PointKey::new::<3>(&[
                    i * 7919 % 101 - 50,
                    i * 104_729 % 97 - 48,
                    i % 9,
                    0,
                    0,
                    0,
                    0,
                    0,
                ])
            })
            .collect();
        keys.sort_unstable();
        for axis in 0..=3 {
            assert!(
                keys.iter().map(|key| key.step::<3>(axis)).is_sorted(),
                "axis {axis}"
            );
        }
    }

    #[test]
    fn numbers_are_first_come_and_survive_growth() {
        let mut index = PointIndex::new();
        let key = |i: i32| PointKey::new::<2>(&[i - 20_000, 3 * (i % 1000), 0, 0, 0, 0, 0, 0]);
        for i in 0..40_000 {
            assert_eq!(index.number(key(i)), i as u32 + 1);
        }
        for i in 0..40_000 {
            assert_eq!(index.number(key(i)), i as u32 + 1);
        }
        assert_eq!(index.into_keys().len(), 40_000);
    }
}
