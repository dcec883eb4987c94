//! Optimisers over one flat buffer of parameters.
//!
//! A model's trainable numbers lie in one `values` vector, their gradients in a `grads` vector of the
//! same form. An [`Optimizer`] is told where each tensor lies ([`Tensor`]), sorts the tensors into
//! groups ([`groups`]) and moves `values`. Loops run over fixed chunks, each element by itself, so the
//! result has the same bits whatever the number of threads. Start reading at [`Optimizer::step`].

mod clip;
mod cuda;
#[cfg(test)]
mod cuda_tests;
mod ema;
pub mod groups;
mod muon;
mod muon_cuda;
mod rules;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use clip::{clip_grad_norm, squared_norm};
pub use cuda::{DeviceOptimizer, LossScale, StepResult, StepTargets};
pub use ema::Ema;
pub use groups::{Group, GroupKind};
pub use muon::newton_schulz;

/// Elements that one task of a parallel loop handles. Fixed, so that nothing depends on the threads.
pub(crate) const CHUNK: usize = 1 << 14;

/// The update rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Stochastic gradient descent with Nesterov momentum and coupled weight decay.
    Sgd,
    /// SGD plus an orthogonalised momentum step (Muon) on matrices and convolution weights.
    MuSgd,
    /// Adam (Kingma and Ba, 2015) with coupled weight decay.
    Adam,
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    AdamW,
    /// Adam with the infinity norm (Kingma and Ba, 2015, section 7).
    Adamax,
    /// Adam with Nesterov momentum (Dozat, 2016).
    NAdam,
    /// Rectified Adam (Liu et al., 2020).
    RAdam,
    /// RMSProp with momentum (Hinton, lecture 6e; Graves, 2013).
    RmsProp,
}

impl Algorithm {
    /// Every algorithm with the name used in configuration files.
    pub const ALL: [(&'static str, Algorithm); 8] = [
        ("SGD", Algorithm::Sgd),
        ("MuSGD", Algorithm::MuSgd),
        ("Adam", Algorithm::Adam),
        ("Adamax", Algorithm::Adamax),
        ("AdamW", Algorithm::AdamW),
        ("NAdam", Algorithm::NAdam),
        ("RAdam", Algorithm::RAdam),
        ("RMSProp", Algorithm::RmsProp),
    ];

    /// The algorithm of that name, letter case ignored.
    pub fn parse(name: &str) -> Option<Algorithm> {
        Self::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|&(_, a)| a)
    }

    /// The name used in configuration files.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|&&(_, a)| a == self).map(|&(n, _)| n).expect("every algorithm is listed")
    }

    /// True when the rule has a momentum that a schedule may warm up (the Adam family has betas).
    pub fn has_momentum(self) -> bool {
        matches!(self, Algorithm::Sgd | Algorithm::MuSgd | Algorithm::RmsProp)
    }

    /// Names of the per-parameter state vectors, in order: none to two.
    fn state_names(self) -> &'static [&'static str] {
        match self {
            Algorithm::Sgd => &["momentum_buffer"],
            Algorithm::MuSgd => &["muon_momentum", "momentum_buffer"],
            Algorithm::Adam | Algorithm::AdamW | Algorithm::NAdam | Algorithm::RAdam => {
                &["exp_avg", "exp_avg_sq"]
            }
            Algorithm::Adamax => &["exp_avg", "exp_inf"],
            Algorithm::RmsProp => &["square_avg", "momentum_buffer"],
        }
    }
}

/// What a tensor is, as far as optimisers care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Weights of convolutions and linear layers.
    Weight,
    /// Scale of a normalisation layer.
    Norm,
    /// Any bias, those of normalisation layers included.
    Bias,
}

/// The matrix a tensor is to an orthogonalising optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Not a matrix: a vector, or a tensor that takes no part.
    Vector,
    /// A row-major matrix of `rows x cols`, as stored. A convolution weight stored
    /// `[k][k][c_in][c_out]` is `k*k*c_in x c_out`: the transpose of the usual one with its columns
    /// permuted, which orthogonalisation does not feel.
    Matrix {
        /// Rows as stored.
        rows: usize,
        /// Columns as stored.
        cols: usize,
        /// `max(1, d2/d1)` where `d2`, `d1` are the last two dimensions of the tensor in its usual
        /// layout: 1 for a convolution with a square kernel.
        aspect: f32,
    },
}

/// One trainable tensor: where it lies and what it is.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name, for group predicates and messages.
    pub name: String,
    /// Where it lies in `values` and `grads`.
    pub range: Range<usize>,
    /// Which of the three groups it belongs to.
    pub role: Role,
    /// Its matrix, for [`Algorithm::MuSgd`].
    pub form: Form,
    /// A frozen tensor sits in its group but is never moved.
    pub frozen: bool,
}

/// Numbers of the update rules that no schedule changes.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// First-moment decay of the Adam family.
    pub beta1: f64,
    /// Second-moment decay of the Adam family.
    pub beta2: f64,
    /// Added to denominators.
    pub eps: f64,
}

impl Default for Hyper {
    fn default() -> Hyper {
        Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// An optimiser: groups with their learning rates, and the state of the update rule.
pub struct Optimizer {
    /// The groups, in the order in which their learning rates are reported.
    pub groups: Vec<Group>,
    algorithm: Algorithm,
    hyper: Hyper,
    tensors: Vec<Tensor>,
    group_of: Vec<usize>,
    state: Vec<Vec<f32>>,
    steps: u64,
    // Product of the momentum schedule, NAdam alone.
    mu_product: f64,
    muon: muon::Workspace,
}

/// Everything an [`Optimizer`] remembers, for checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// Steps taken.
    pub steps: u64,
    /// Product of the momentum schedule of NAdam; 1 for the others.
    pub mu_product: f64,
    /// Named vectors, each as long as the parameter buffer.
    pub vectors: Vec<(String, Vec<f32>)>,
}

/// The same by reference, so that saving copies nothing.
#[derive(Clone, Debug)]
pub struct OptimizerStateRef<'a> {
    /// Steps taken.
    pub steps: u64,
    /// Product of the momentum schedule of NAdam; 1 for the others.
    pub mu_product: f64,
    /// Named vectors, each as long as the parameter buffer.
    pub vectors: Vec<(&'a str, &'a [f32])>,
}

impl OptimizerState {
    /// The state by reference.
    pub fn by_ref(&self) -> OptimizerStateRef<'_> {
        let vectors = self.vectors.iter().map(|(n, v)| (n.as_str(), v.as_slice())).collect();
        OptimizerStateRef { steps: self.steps, mu_product: self.mu_product, vectors }
    }
}

/// A saved state does not fit the optimiser.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum StateError {
    /// The vectors are those of another update rule.
    #[error("optimiser state holds {found:?}, {algorithm} needs {expected:?}")]
    Names {
        /// The optimiser.
        algorithm: &'static str,
        /// What it needs.
        expected: Vec<String>,
        /// What was given.
        found: Vec<String>,
    },
    /// A vector has another length than the parameters.
    #[error("optimiser state {name} has {found} elements, the model has {expected}")]
    Length {
        /// The vector.
        name: String,
        /// Parameters of the model.
        expected: usize,
        /// Elements given.
        found: usize,
    },
}

impl Optimizer {
    /// An optimiser for `len` parameters of which `tensors` are described, sorted by
    /// [`groups::build`] into the groups it returns.
    ///
    /// # Panics
    /// When tensors overlap, are not in ascending order or end past `len` (a fault of the caller).
    pub fn new(
        algorithm: Algorithm,
        hyper: Hyper,
        tensors: Vec<Tensor>,
        groups: Vec<Group>,
        len: usize,
    ) -> Optimizer {
        let mut end = 0;
        for t in &tensors {
            assert!(t.range.start >= end && t.range.end >= t.range.start, "{} is out of order", t.name);
            end = t.range.end;
        }
        assert!(end <= len, "tensors end at {end}, the buffer has {len}");
        let mut group_of = vec![usize::MAX; tensors.len()];
        for (g, group) in groups.iter().enumerate() {
            for &member in &group.members {
                group_of[member] = g;
            }
        }
        assert!(group_of.iter().all(|&g| g < groups.len()), "every tensor needs a group");
        let state = algorithm.state_names().iter().map(|_| vec![0.0; len]).collect();
        let muon = muon::Workspace::default();
        Optimizer { groups, algorithm, hyper, tensors, group_of, state, steps: 0, mu_product: 1.0, muon }
    }

    /// The update rule.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Bytes of the state vectors.
    pub fn state_bytes(&self) -> usize {
        self.state.iter().map(|v| v.len() * 4).sum()
    }

    /// Sets the gradients of frozen tensors to zero, so that they count in no norm.
    pub fn zero_frozen(&self, grads: &mut [f32]) {
        for t in self.tensors.iter().filter(|t| t.frozen) {
            grads[t.range.clone()].fill(0.0);
        }
    }

    /// Moves `values` by one step along `grads` with the groups' current learning rates.
    ///
    /// # Shapes
    /// Both as long as the `len` given to [`Optimizer::new`].
    pub fn step(&mut self, values: &mut [f32], grads: &[f32]) {
        assert_eq!(values.len(), grads.len());
        self.steps += 1;
        let rules = rules::prepare(self, self.steps);
        if self.algorithm == Algorithm::MuSgd {
            self.muon_step(values, grads);
        }
        let chunks = self.chunks(values, grads);
        rules::apply(&rules, chunks);
        if let Some(next) = rules.mu_product {
            self.mu_product = next;
        }
    }

    /// What the optimiser remembers.
    pub fn state(&self) -> OptimizerStateRef<'_> {
        let names = self.algorithm.state_names();
        let vectors = names.iter().zip(&self.state).map(|(&n, v)| (n, v.as_slice())).collect();
        OptimizerStateRef { steps: self.steps, mu_product: self.mu_product, vectors }
    }

    /// A copy of what the optimiser remembers.
    pub fn export(&self) -> OptimizerState {
        let OptimizerStateRef { steps, mu_product, vectors } = self.state();
        let vectors = vectors.into_iter().map(|(n, v)| (n.to_owned(), v.to_vec())).collect();
        OptimizerState { steps, mu_product, vectors }
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// When it is that of another rule or another model; the optimiser is then unchanged.
    pub fn import(&mut self, saved: &OptimizerState) -> Result<(), StateError> {
        let expected: Vec<String> = self.algorithm.state_names().iter().map(|n| n.to_string()).collect();
        let found: Vec<String> = saved.vectors.iter().map(|(n, _)| n.clone()).collect();
        if expected != found {
            return Err(StateError::Names { algorithm: self.algorithm.name(), expected, found });
        }
        for ((name, vector), own) in saved.vectors.iter().zip(&self.state) {
            if vector.len() != own.len() {
                let (expected, found) = (own.len(), vector.len());
                return Err(StateError::Length { name: name.clone(), expected, found });
            }
        }
        for ((_, vector), own) in saved.vectors.iter().zip(&mut self.state) {
            own.copy_from_slice(vector);
        }
        self.steps = saved.steps;
        self.mu_product = saved.mu_product;
        Ok(())
    }

    /// Cuts parameters, gradients and state into aligned chunks, frozen tensors left out.
    fn chunks<'a>(&'a mut self, values: &'a mut [f32], grads: &'a [f32]) -> Vec<rules::Chunk<'a>> {
        let (first, second) = self.state.split_at_mut(1);
        let mut a = first[0].as_mut_slice();
        let mut b: &mut [f32] = second.first_mut().map_or(&mut [], |v| v.as_mut_slice());
        let has_b = !b.is_empty();
        let (mut p, mut g, mut at) = (values, grads, 0);
        let mut chunks = Vec::with_capacity(g.len() / CHUNK + self.tensors.len());
        for (tensor, &group) in self.tensors.iter().zip(&self.group_of) {
            let skip = tensor.range.start - at;
            (p, g, a) = (&mut p[skip..], &g[skip..], &mut a[skip..]);
            if has_b {
                b = &mut b[skip..];
            }
            let mut left = tensor.range.len();
            at = tensor.range.end;
            while left > 0 {
                let n = left.min(CHUNK);
                left -= n;
                let (p0, p1) = p.split_at_mut(n);
                let (g0, g1) = g.split_at(n);
                let (a0, a1) = a.split_at_mut(n);
                let (b0, b1) = b.split_at_mut(if has_b { n } else { 0 });
                (p, g, a, b) = (p1, g1, a1, b1);
                if !tensor.frozen {
                    chunks.push(rules::Chunk { p: p0, g: g0, a: a0, b: b0, group });
                }
            }
        }
        chunks
    }

    /// The orthogonalised part of MuSGD on the tensors of the muon groups.
    fn muon_step(&mut self, values: &mut [f32], grads: &[f32]) {
        for (tensor, &g) in self.tensors.iter().zip(&self.group_of) {
            let group = &self.groups[g];
            let Form::Matrix { rows, cols, aspect } = tensor.form else { continue };
            if group.kind != GroupKind::Muon || tensor.frozen {
                continue;
            }
            let range = tensor.range.clone();
            let momentum = &mut self.state[0][range.clone()];
            muon::step(
                &mut values[range.clone()],
                &grads[range],
                momentum,
                &muon::Step { rows, cols, aspect, lr: group.lr, momentum: group.momentum },
                &mut self.muon,
            );
        }
    }
}
