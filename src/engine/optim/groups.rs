//! Parameter groups: which tensors share a learning rate and a weight decay.

use super::{Algorithm, Form, Role, Tensor};

/// What the members of a group have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// Weights: decayed.
    Weight,
    /// Scales of normalisation layers: not decayed.
    Norm,
    /// Biases: not decayed; their learning rate warms up from its own start.
    Bias,
    /// Matrices and convolution weights under MuSGD: decayed, moved by the orthogonalised step too.
    Muon,
}

/// A parameter group. The schedule writes `lr` and `momentum` before every step.
#[derive(Clone, Debug)]
pub struct Group {
    /// What its members are.
    pub kind: GroupKind,
    /// Indices of its tensors.
    pub members: Vec<usize>,
    /// Weight decay of the group.
    pub weight_decay: f64,
    /// Learning rate that the schedule multiplies.
    pub initial_lr: f64,
    /// Learning rate of the next step.
    pub lr: f64,
    /// Momentum of the next step (rules with momentum).
    pub momentum: f64,
}

/// Learning rate of the class branches under MuSGD, relative to the rest.
const CLASS_BRANCH_LR_SCALE: f64 = 3.0;

/// Sorts tensors into groups.
///
/// Weight, norm, bias in this order. MuSGD takes every matrix out into a fourth group and splits
/// each group in two: class branches with three times the learning rate, then the rest; empty groups
/// stay, so that a network always reports the same number of learning rates.
pub fn build(
    algorithm: Algorithm,
    tensors: &[Tensor],
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    is_class_branch: impl Fn(&str) -> bool,
) -> Vec<Group> {
    let muon = algorithm == Algorithm::MuSgd;
    let kind_of = |t: &Tensor| match t.role {
        _ if muon && matches!(t.form, Form::Matrix { .. }) => GroupKind::Muon,
        Role::Weight => GroupKind::Weight,
        Role::Norm => GroupKind::Norm,
        Role::Bias => GroupKind::Bias,
    };
    let kinds = [GroupKind::Weight, GroupKind::Norm, GroupKind::Bias, GroupKind::Muon];
    let mut groups = Vec::new();
    for &kind in &kinds[..if muon { 4 } else { 3 }] {
        let decay = if matches!(kind, GroupKind::Weight | GroupKind::Muon) { weight_decay } else { 0.0 };
        let pick = |class: Option<bool>| -> Vec<usize> {
            let of_kind = (0..tensors.len()).filter(|&i| kind_of(&tensors[i]) == kind);
            of_kind.filter(|&i| class.is_none_or(|c| is_class_branch(&tensors[i].name) == c)).collect()
        };
        let mut push = |members, lr| {
            groups.push(Group { kind, members, weight_decay: decay, initial_lr: lr, lr, momentum });
        };
        if muon {
            push(pick(Some(true)), lr * CLASS_BRANCH_LR_SCALE);
            push(pick(Some(false)), lr);
        } else {
            push(pick(None), lr);
        }
    }
    groups
}
