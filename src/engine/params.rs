//! The numbers of a network: trainable values, their gradients, running statistics.
//!
//! All trainable numbers lie in one flat vector, so that optimisers, averaging and checkpoints are single
//! sweeps. Convolution weights are stored HWIO (`[k][k][c_in][c_out]`), the order in which the kernels
//! produce gradients; the outside world (files, tests) sees the reference's OIHW.

use std::ops::Range;

use super::error::EngineError;
use super::graph::Graph;
use super::optim::{Form, Role, Tensor};

/// What a parameter is; decides its shape, its place and its optimiser group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// Convolution weight, `[c_out, c_in, k, k]` outside, HWIO inside.
    ConvWeight {
        /// Kernel size.
        kernel: usize,
        /// Input channels.
        c_in: usize,
        /// Output channels.
        c_out: usize,
    },
    /// Bias of a plain convolution, `[c]`.
    Bias {
        /// Channels.
        c: usize,
        /// Inputs of one output, for the initial range.
        fan_in: usize,
    },
    /// Scale of a batch normalisation, `[c]`.
    NormWeight {
        /// Channels.
        c: usize,
    },
    /// Shift of a batch normalisation, `[c]`.
    NormBias {
        /// Channels.
        c: usize,
    },
    /// Running mean, `[c]`; not trained.
    RunningMean {
        /// Channels.
        c: usize,
    },
    /// Running variance, `[c]`; not trained.
    RunningVar {
        /// Channels.
        c: usize,
    },
}

impl ParamKind {
    /// Shape as the reference writes it.
    pub fn shape(&self) -> Vec<usize> {
        match *self {
            ParamKind::ConvWeight { kernel, c_in, c_out } => vec![c_out, c_in, kernel, kernel],
            ParamKind::Bias { c, .. }
            | ParamKind::NormWeight { c }
            | ParamKind::NormBias { c }
            | ParamKind::RunningMean { c }
            | ParamKind::RunningVar { c } => vec![c],
        }
    }

    /// Numbers in it.
    pub fn numel(&self) -> usize {
        self.shape().iter().product()
    }

    /// True for running statistics, which no optimiser touches.
    pub fn is_buffer(&self) -> bool {
        matches!(self, ParamKind::RunningMean { .. } | ParamKind::RunningVar { .. })
    }
}

/// A parameter as a graph declares it.
#[derive(Clone, Debug)]
pub struct ParamDecl {
    /// Reference state-dict name, for example `model.0.conv.weight`.
    pub name: String,
    /// What it is.
    pub kind: ParamKind,
}

/// A parameter and where it lies.
#[derive(Clone, Debug)]
pub struct ParamInfo {
    /// Reference state-dict name.
    pub name: String,
    /// What it is.
    pub kind: ParamKind,
    /// Its numbers in `values` and `grads`, or in `buffers` for running statistics.
    pub range: Range<usize>,
    /// Never updated; batch normalisation of a frozen layer uses its running statistics.
    pub frozen: bool,
}

/// Parameters of one network.
#[derive(Clone, Debug)]
pub struct ParamSet {
    /// Trainable numbers; each tensor starts at a multiple of 16, gaps are zero and stay so.
    pub values: Vec<f32>,
    /// Gradients, in the same places. Backward passes add; the optimiser's caller clears.
    pub grads: Vec<f32>,
    /// Running statistics.
    pub buffers: Vec<f32>,
    /// One entry for each parameter, in the order of the network.
    pub infos: Vec<ParamInfo>,
}

impl ParamSet {
    /// All parameters of a graph: normalisation scales and running variances 1, everything else 0.
    pub fn new(graph: &Graph) -> ParamSet {
        let (mut values, mut buffers, mut infos) = (0, 0, Vec::with_capacity(graph.params.len()));
        for decl in &graph.params {
            let place = if decl.kind.is_buffer() { &mut buffers } else { &mut values };
            let range = *place..*place + decl.kind.numel();
            *place = range.end.next_multiple_of(16);
            infos.push(ParamInfo { name: decl.name.clone(), kind: decl.kind, range, frozen: false });
        }
        let mut set = ParamSet {
            values: vec![0.0; values],
            grads: vec![0.0; values],
            buffers: vec![0.0; buffers],
            infos,
        };
        for i in 0..set.infos.len() {
            if matches!(set.infos[i].kind, ParamKind::NormWeight { .. } | ParamKind::RunningVar { .. }) {
                set.numbers_mut(i).fill(1.0);
            }
        }
        set
    }

    /// Index of a parameter by name.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.infos.iter().position(|p| p.name == name)
    }

    /// Numbers of parameter `i` as stored.
    pub fn numbers(&self, i: usize) -> &[f32] {
        let info = &self.infos[i];
        if info.kind.is_buffer() {
            &self.buffers[info.range.clone()]
        } else {
            &self.values[info.range.clone()]
        }
    }

    /// Numbers of parameter `i` as stored.
    pub fn numbers_mut(&mut self, i: usize) -> &mut [f32] {
        let info = &self.infos[i];
        if info.kind.is_buffer() {
            &mut self.buffers[info.range.clone()]
        } else {
            &mut self.values[info.range.clone()]
        }
    }

    /// A parameter in the reference's shape and order.
    pub fn export(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), EngineError> {
        let i = self.find(name)?;
        Ok((self.infos[i].kind.shape(), to_reference(&self.infos[i].kind, self.numbers(i))))
    }

    /// The gradient of a parameter in the reference's shape and order.
    pub fn export_grad(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), EngineError> {
        let i = self.find(name)?;
        let info = &self.infos[i];
        let numbers =
            if info.kind.is_buffer() { Vec::new() } else { self.grads[info.range.clone()].to_vec() };
        Ok((info.kind.shape(), to_reference(&info.kind, &numbers)))
    }

    /// Sets a parameter from the reference's shape and order.
    pub fn import(&mut self, name: &str, shape: &[usize], numbers: &[f32]) -> Result<(), EngineError> {
        let i = self.find(name)?;
        let kind = self.infos[i].kind;
        let expected = kind.shape();
        if expected != shape || numbers.len() != kind.numel() {
            return Err(EngineError::Shape { name: name.to_owned(), expected, got: shape.to_vec() });
        }
        self.numbers_mut(i).copy_from_slice(&from_reference(&kind, numbers));
        Ok(())
    }

    /// The trainable tensors as optimisers see them, in the order of the network.
    pub fn tensors(&self) -> Vec<Tensor> {
        let trainable = self.infos.iter().filter(|p| !p.kind.is_buffer());
        let tensors = trainable.map(|p| {
            let (role, form) = match p.kind {
                ParamKind::ConvWeight { kernel, c_in, c_out } => {
                    // The last two dimensions of a convolution weight are its square kernel.
                    let form = Form::Matrix { rows: kernel * kernel * c_in, cols: c_out, aspect: 1.0 };
                    (Role::Weight, form)
                }
                ParamKind::NormWeight { .. } => (Role::Norm, Form::Vector),
                _ => (Role::Bias, Form::Vector),
            };
            Tensor { name: p.name.clone(), range: p.range.clone(), role, form, frozen: p.frozen }
        });
        tensors.collect()
    }

    /// Sets all gradients to zero.
    pub fn clear_grads(&mut self) {
        self.grads.fill(0.0);
    }

    /// Trainable numbers without the gaps.
    pub fn trainable_count(&self) -> usize {
        self.infos.iter().filter(|p| !p.kind.is_buffer()).map(|p| p.kind.numel()).sum()
    }

    fn find(&self, name: &str) -> Result<usize, EngineError> {
        self.index(name).ok_or_else(|| EngineError::UnknownParameter { name: name.to_owned() })
    }
}

/// HWIO to OIHW; other kinds as they are.
pub fn to_reference(kind: &ParamKind, stored: &[f32]) -> Vec<f32> {
    permute(kind, stored, |taps, c_in, c_out, t, i, o| {
        ((t * c_in + i) * c_out + o, (o * c_in + i) * taps + t)
    })
}

/// OIHW to HWIO; other kinds as they are.
pub fn from_reference(kind: &ParamKind, reference: &[f32]) -> Vec<f32> {
    permute(kind, reference, |taps, c_in, c_out, t, i, o| {
        ((o * c_in + i) * taps + t, (t * c_in + i) * c_out + o)
    })
}

/// Moves each weight from the first to the second index that `places` gives.
fn permute(
    kind: &ParamKind,
    from: &[f32],
    places: impl Fn(usize, usize, usize, usize, usize, usize) -> (usize, usize),
) -> Vec<f32> {
    let ParamKind::ConvWeight { kernel, c_in, c_out } = *kind else { return from.to_vec() };
    let taps = kernel * kernel;
    let mut to = vec![0.0; from.len()];
    for t in 0..taps {
        for i in 0..c_in {
            for o in 0..c_out {
                let (source, target) = places(taps, c_in, c_out, t, i, o);
                to[target] = from[source];
            }
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_order_round_trips() {
        let kind = ParamKind::ConvWeight { kernel: 3, c_in: 2, c_out: 5 };
        let stored: Vec<f32> = (0..90).map(|i| i as f32).collect();
        let reference = to_reference(&kind, &stored);
        // Tap 4 (centre), input 1, output 3: HWIO index (4 * 2 + 1) * 5 + 3, OIHW index (3 * 2 + 1) * 9 + 4.
        assert_eq!(reference[67], stored[48]);
        assert_eq!(from_reference(&kind, &reference), stored);
    }
}
