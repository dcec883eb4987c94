//! The element-wise update rules.
//!
//! All constants that depend on the step are worked out once in `f64` ([`prepare`]); the loops are
//! plain `f32` over equal slices, which the compiler vectorises.

use rayon::prelude::*;

use super::{Algorithm, Optimizer};

/// A piece of one tensor: parameters, gradients and up to two states of equal length.
pub(super) struct Chunk<'a> {
    pub p: &'a mut [f32],
    pub g: &'a [f32],
    pub a: &'a mut [f32],
    pub b: &'a mut [f32],
    pub group: usize,
}

/// One rule with its constants, for one group.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    Sgd { lr: f32, momentum: f32, decay: f32, second_state: bool },
    Adam { step: f32, beta1: f32, beta2: f32, root2: f32, eps: f32, coupled: f32, decoupled: f32 },
    Adamax { step: f32, beta1: f32, beta2: f32, eps: f32, decay: f32 },
    NAdam { g_step: f32, m_step: f32, beta1: f32, beta2: f32, root2: f32, eps: f32, decay: f32 },
    RAdam { step: f32, beta1: f32, beta2: f32, rectify: Option<f32>, eps: f32, decay: f32 },
    RmsProp { lr: f32, momentum: f32, eps: f32, decay: f32 },
}

/// Smoothing of the squared gradient in RMSProp.
const RMSPROP_ALPHA: f32 = 0.99;
/// How fast the momentum of NAdam approaches beta1.
const NADAM_MOMENTUM_DECAY: f64 = 4e-3;

/// The rules of a step, one per group.
pub(super) struct Prepared {
    rules: Vec<Rule>,
    pub mu_product: Option<f64>,
}

impl Prepared {
    /// One for each group.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

/// Works out the constants of step `step` (counted from 1).
pub(super) fn prepare(optimizer: &Optimizer, step: u64) -> Prepared {
    let t = step as f64;
    let h = optimizer.hyper;
    let correction1 = 1.0 - h.beta1.powf(t);
    let correction2 = 1.0 - h.beta2.powf(t);
    let (beta1, beta2, eps) = (h.beta1 as f32, h.beta2 as f32, h.eps as f32);
    let root2 = correction2.sqrt() as f32;
    let mu_at = |t: f64| h.beta1 * (1.0 - 0.5 * 0.96f64.powf(t * NADAM_MOMENTUM_DECAY));
    let mu_product = optimizer.mu_product * mu_at(t);
    let rules = optimizer.groups.iter().map(|group| {
        let (lr, decay) = (group.lr, group.weight_decay as f32);
        let momentum = group.momentum as f32;
        match optimizer.algorithm {
            Algorithm::Sgd => Rule::Sgd { lr: lr as f32, momentum, decay, second_state: false },
            Algorithm::MuSgd => Rule::Sgd { lr: lr as f32, momentum, decay, second_state: true },
            Algorithm::Adam | Algorithm::AdamW => {
                let is_decoupled = optimizer.algorithm == Algorithm::AdamW;
                let keep = if is_decoupled { 1.0 - lr * group.weight_decay } else { 1.0 };
                let coupled = if is_decoupled { 0.0 } else { decay };
                let step = (lr / correction1) as f32;
                Rule::Adam { step, beta1, beta2, root2, eps, coupled, decoupled: keep as f32 }
            }
            Algorithm::Adamax => Rule::Adamax { step: (lr / correction1) as f32, beta1, beta2, eps, decay },
            Algorithm::NAdam => {
                let next = mu_at(t + 1.0);
                let g_step = (lr * (1.0 - mu_at(t)) / (1.0 - mu_product)) as f32;
                let m_step = (lr * next / (1.0 - mu_product * next)) as f32;
                Rule::NAdam { g_step, m_step, beta1, beta2, root2, eps, decay }
            }
            Algorithm::RAdam => {
                let rho_end = 2.0 / (1.0 - h.beta2) - 1.0;
                let rho = rho_end - 2.0 * t * h.beta2.powf(t) / correction2;
                let rectify = (rho > 5.0).then(|| {
                    let top = (rho - 4.0) * (rho - 2.0) * rho_end;
                    let bottom = (rho_end - 4.0) * (rho_end - 2.0) * rho;
                    ((top / bottom).sqrt() * correction2.sqrt()) as f32
                });
                Rule::RAdam { step: (lr / correction1) as f32, beta1, beta2, rectify, eps, decay }
            }
            Algorithm::RmsProp => Rule::RmsProp { lr: lr as f32, momentum, eps, decay },
        }
    });
    let rules = rules.collect();
    Prepared { rules, mu_product: (optimizer.algorithm == Algorithm::NAdam).then_some(mu_product) }
}

/// Applies each chunk's rule, chunks in parallel.
pub(super) fn apply(prepared: &Prepared, chunks: Vec<Chunk>) {
    chunks.into_par_iter().for_each(|chunk| {
        let rule = prepared.rules[chunk.group];
        update(rule, chunk);
    });
}

fn update(rule: Rule, chunk: Chunk) {
    let Chunk { p, g, a, b, .. } = chunk;
    match rule {
        Rule::Sgd { lr, momentum, decay, second_state } => {
            let buffer = if second_state { b } else { a };
            for ((p, &g), buffer) in p.iter_mut().zip(g).zip(buffer) {
                let g = g + decay * *p;
                *buffer = momentum * *buffer + g;
                *p -= lr * (g + momentum * *buffer);
            }
        }
        Rule::Adam { step, beta1, beta2, root2, eps, coupled, decoupled } => {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(a).zip(b) {
                let kept = *p * decoupled;
                let g = g + coupled * *p;
                *m += (g - *m) * (1.0 - beta1);
                *v = *v * beta2 + (1.0 - beta2) * g * g;
                *p = kept - step * (*m / (v.sqrt() / root2 + eps));
            }
        }
        Rule::Adamax { step, beta1, beta2, eps, decay } => {
            for (((p, &g), m), u) in p.iter_mut().zip(g).zip(a).zip(b) {
                let g = g + decay * *p;
                *m += (g - *m) * (1.0 - beta1);
                *u = (*u * beta2).max(g.abs() + eps);
                *p -= step * (*m / *u);
            }
        }
        Rule::NAdam { g_step, m_step, beta1, beta2, root2, eps, decay } => {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(a).zip(b) {
                let g = g + decay * *p;
                *m += (g - *m) * (1.0 - beta1);
                *v = *v * beta2 + (1.0 - beta2) * g * g;
                let denominator = v.sqrt() / root2 + eps;
                *p -= g_step * (g / denominator);
                *p -= m_step * (*m / denominator);
            }
        }
        Rule::RAdam { step, beta1, beta2, rectify, eps, decay } => {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(a).zip(b) {
                let g = g + decay * *p;
                *m += (g - *m) * (1.0 - beta1);
                *v = *v * beta2 + (1.0 - beta2) * g * g;
                let scale = rectify.map_or(1.0, |r| r / (v.sqrt() + eps));
                *p -= step * *m * scale;
            }
        }
        Rule::RmsProp { lr, momentum, eps, decay } => {
            for (((p, &g), square), buffer) in p.iter_mut().zip(g).zip(a).zip(b) {
                let g = g + decay * *p;
                *square = *square * RMSPROP_ALPHA + (1.0 - RMSPROP_ALPHA) * g * g;
                *buffer = momentum * *buffer + g / (square.sqrt() + eps);
                *p -= lr * *buffer;
            }
        }
    }
}
