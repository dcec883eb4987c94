//! Which cut of each convolution was measured to be the fastest on one chip.
//!
//! A cut fixes the order of sums, so whoever plans and whoever launches must hold the same [`Tuning`], and a run that
//! goes on must hold the one it began with: it is part of the plan's target and of every checkpoint. A case that is
//! not in it, or whose entry the chip does not offer, is cut by the model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{MmaConfig, Pass, Shape};
use crate::engine::device::cuda::{Chip, Precision};
use crate::engine::ops::conv2d::Conv2dParams;

/// One pass of one convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Which sum.
    pub pass: Pass,
    /// The convolution.
    pub params: Conv2dParams,
    /// Its maps.
    pub shape: Shape,
}

/// Measured configurations of one kind of chip and one precision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// [`made_for`]; empty in the empty table.
    made_for: String,
    #[serde(with = "list")]
    entries: BTreeMap<Case, MmaConfig>,
}

/// Names a kind of chip and a precision, fit for a file's name.
pub fn made_for(chip: &Chip, precision: Precision) -> String {
    let name: String = chip.name.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric()).collect();
    format!("{name}-{}-{}mp-{}", chip.target(), chip.multiprocessors, precision.suffix())
}

impl Tuning {
    /// An empty table for a chip and precision.
    pub fn new(chip: &Chip, precision: Precision) -> Tuning {
        Tuning { made_for: made_for(chip, precision), entries: BTreeMap::new() }
    }

    /// Whether it was measured on this kind of chip in this precision.
    pub fn fits(&self, chip: &Chip, precision: Precision) -> bool {
        self.made_for == made_for(chip, precision)
    }

    /// Cases.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when the model decides everything.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry of a case.
    pub fn get(&self, case: &Case) -> Option<MmaConfig> {
        self.entries.get(case).copied()
    }

    /// Sets the entry of a case.
    pub fn insert(&mut self, case: Case, config: MmaConfig) {
        self.entries.insert(case, config);
    }

    /// Takes over the entries of another table, which replace those held. Both are for one chip and precision.
    pub fn extend(&mut self, other: &Tuning) {
        self.entries.extend(&other.entries);
    }

    /// Drops the entries of convolutions that `is_kept` refuses.
    pub fn retain(&mut self, is_kept: impl Fn(&Conv2dParams) -> bool) {
        self.entries.retain(|case, _| is_kept(&case.params));
    }

    /// How a case is cut: as measured where the chip offers that cut, otherwise by the model.
    pub fn choose(&self, pass: Pass, p: &Conv2dParams, shape: &Shape, chip: &Chip) -> MmaConfig {
        let measured = self.get(&Case { pass, params: *p, shape: *shape });
        // A table comes from a file: nothing is launched on its word alone.
        let offered = |config: &MmaConfig| {
            MmaConfig::candidates(pass, p, shape, chip, super::wgmma::is_wanted(chip)).contains(config)
        };
        measured.filter(offered).unwrap_or_else(|| MmaConfig::choose(pass, p, shape, chip))
    }

    /// A hash of everything in it: equal tables give equal bits.
    pub fn identity(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        Sha256::digest(text)[..16].iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Entries as a list, since JSON has no keys but text.
mod list {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::{Case, MmaConfig};

    pub fn serialize<S: Serializer>(
        entries: &BTreeMap<Case, MmaConfig>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(entries)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(
        deserializer: D,
    ) -> Result<BTreeMap<Case, MmaConfig>, D::Error> {
        Ok(Vec::<(Case, MmaConfig)>::deserialize(deserializer)?.into_iter().collect())
    }
}
