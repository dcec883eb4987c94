//! Counter-based random numbers: a value is a function of (seed, stream, counter), never of history.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A stream is
//! named by what it is for ([`Use`]), the epoch and an index (an image, a batch), so a killed and
//! resumed run draws what the undisturbed run would have drawn, whatever threads do.

/// What a stream of random numbers is for. The discriminants are part of the resume format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Use {
    /// Initial weights; the index is the tensor's.
    Init = 1,
    /// Order of the images of an epoch.
    Shuffle = 2,
    /// Augmentation of one sample; the index is its place in the epoch.
    Augment = 3,
    /// Input size of a batch (`multi_scale`); the index is the batch.
    MultiScale = 4,
    /// Synthetic data.
    Synth = 5,
    /// Tests.
    Test = 6,
}

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// The stream for `use_` in `epoch` at `index`.
    pub fn new(seed: u64, use_: Use, epoch: u32, index: u32) -> Rng {
        Rng {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, use_ as u32, epoch, index],
            block: [0; 4],
            used: 4,
        }
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in `0..n`; 0 for `n == 0`.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias of a 64-bit product is below n / 2^64.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Gamma(shape, 1) for `shape >= 1` (Marsaglia and Tsang, 2000).
    fn gamma(&mut self, shape: f64) -> f64 {
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        // Each round is accepted with probability above 0.95; 1,000 misses cannot happen.
        for _ in 0..1_000 {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
        d
    }

    /// Beta(a, b) for `a, b >= 1`.
    pub fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        x / (x + y)
    }

    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Philox4x32 with 10 rounds.
fn philox4x32_10(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = 0xD251_1F53u64 * u64::from(c[0]);
        let p1 = 0xCD9E_8D57u64 * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    // Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([0xffff_ffff; 4], [0xffff_ffff; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn moments_are_right() {
        let mut rng = Rng::new(7, Use::Test, 0, 0);
        let n = 20_000;
        let (mut mean, mut normal_var, mut beta_mean) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            mean += rng.uniform() / f64::from(n);
            normal_var += rng.normal().powi(2) / f64::from(n);
            beta_mean += rng.beta(32.0, 32.0) / f64::from(n);
        }
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert!((normal_var - 1.0).abs() < 0.05, "{normal_var}");
        assert!((beta_mean - 0.5).abs() < 0.005, "{beta_mean}");
    }
}
