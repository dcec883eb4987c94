//! Initial weights, and which of them stay as they are.

use crate::detect::models::Detector;
use crate::engine::params::{ParamKind, ParamSet};
use crate::engine::rng::{Rng, Use};
use crate::train::args::Freeze;
use crate::train::error::TrainError;

/// Side of the image for which the class biases assume five objects.
const BIAS_IMAGE_SIDE: f64 = 640.0;
/// Bias of the box branches: distances begin near two cells.
const BOX_BIAS: f32 = 2.0;

/// Draws every weight.
///
/// Convolution weights: uniform(-b, b), b = 1 / sqrt(fan_in). Normalisation: scale 1, shift 0, mean 0,
/// variance 1. Box biases 2; class biases ln(5 / nc / (640 / stride)^2). Each tensor has a random stream
/// of its own, numbered by its place in the network.
pub fn initialise(params: &mut ParamSet, detector: &Detector, seed: u64) {
    for index in 0..params.infos.len() {
        let kind = params.infos[index].kind;
        let name = params.infos[index].name.clone();
        let numbers = params.numbers_mut(index);
        match kind {
            ParamKind::ConvWeight { kernel, c_in, .. } => {
                uniform(numbers, c_in * kernel * kernel, seed, index);
            }
            ParamKind::Bias { fan_in, .. } => match head_branch(&name, detector.head_row) {
                Some((Branch::Box, _)) => numbers.fill(BOX_BIAS),
                Some((Branch::Class, level)) => {
                    let cells = (BIAS_IMAGE_SIDE / detector.strides[level] as f64).powi(2);
                    numbers.fill((5.0 / detector.nc as f64 / cells).ln() as f32);
                }
                None => uniform(numbers, fan_in, seed, index),
            },
            ParamKind::NormWeight { .. } | ParamKind::RunningVar { .. } => numbers.fill(1.0),
            ParamKind::NormBias { .. } | ParamKind::RunningMean { .. } => numbers.fill(0.0),
        }
    }
}

fn uniform(numbers: &mut [f32], fan_in: usize, seed: u64, index: usize) {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let mut rng = Rng::new(seed, Use::Init, 0, index as u32);
    numbers.iter_mut().for_each(|v| *v = rng.range(-bound, bound) as f32);
}

/// A branch of the detection head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// Box distances.
    Box,
    /// Class scores.
    Class,
}

/// Branch and level of a head parameter `model.<row>.cv2|cv3.<level>.…`; `None` elsewhere.
pub fn head_branch(name: &str, head_row: usize) -> Option<(Branch, usize)> {
    let rest = name.strip_prefix("model.")?.strip_prefix(&head_row.to_string())?.strip_prefix('.')?;
    let (branch, rest) = rest.split_once('.')?;
    let branch = match branch {
        "cv2" => Branch::Box,
        "cv3" => Branch::Class,
        _ => return None,
    };
    let (level, _) = rest.split_once('.')?;
    Some((branch, level.parse().ok()?))
}

/// Marks what `freeze` names: rows of the model table, and parameters whose name holds a part.
///
/// # Errors
/// A row that the model does not have, a name that matches nothing, or nothing left to train.
pub fn freeze(params: &mut ParamSet, freeze: &Freeze, head_row: usize) -> Result<usize, TrainError> {
    let fault = |message| TrainError::Config { key: "freeze".into(), message };
    let (rows, names): (Vec<u32>, &[String]) = match freeze {
        Freeze::Nothing => return Ok(0),
        Freeze::First(count) => ((0..*count).collect(), &[]),
        Freeze::Some { rows, names } => (rows.clone(), names),
    };
    if let Some(row) = rows.iter().find(|&&row| row as usize > head_row) {
        return Err(fault(format!("row {row} does not exist; the model has rows 0 to {head_row}")));
    }
    for name in names {
        if !params.infos.iter().any(|p| p.name.contains(name.as_str())) {
            return Err(fault(format!("no parameter name holds {name:?}")));
        }
    }
    let prefixes: Vec<String> = rows.iter().map(|row| format!("model.{row}.")).collect();
    for info in &mut params.infos {
        info.frozen = prefixes.iter().any(|p| info.name.starts_with(p))
            || names.iter().any(|n| info.name.contains(n.as_str()));
    }
    if params.infos.iter().all(|p| p.frozen || p.kind.is_buffer()) {
        return Err(fault("nothing is left to train".into()));
    }
    Ok(params.infos.iter().filter(|p| p.frozen && !p.kind.is_buffer()).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> (Detector, ParamSet) {
        let detector = Detector::build("yolov8n", 3, 64, 64).expect("a shipped model");
        let params = ParamSet::new(&detector.graph);
        (detector, params)
    }

    #[test]
    fn weights_fill_their_range_and_biases_are_the_documented_ones() {
        let (detector, mut params) = network();
        initialise(&mut params, &detector, 7);
        let find = |name: &str| params.numbers(params.index(name).expect(name));
        let bound = 1.0 / (3.0f32 * 9.0).sqrt();
        let first = find("model.0.conv.weight");
        assert!(first.iter().all(|v| v.abs() <= bound));
        let deviation = (first.iter().map(|v| v * v).sum::<f32>() / first.len() as f32).sqrt();
        assert!((deviation / (bound / 3.0f32.sqrt()) - 1.0).abs() < 0.1, "{deviation}");
        for (level, expected) in [-8.2532, -6.8669, -5.4806].into_iter().enumerate() {
            let bias = find(&format!("model.22.cv3.{level}.2.bias"));
            assert!(bias.iter().all(|b| (b - expected).abs() < 1e-4), "{bias:?}");
            assert!(find(&format!("model.22.cv2.{level}.2.bias")).iter().all(|&b| b == 2.0));
        }
        let again = {
            let (detector, mut params) = network();
            initialise(&mut params, &detector, 7);
            params.values
        };
        assert_eq!(params.values, again);
    }

    #[test]
    fn freezing_takes_rows_and_names() {
        let (detector, mut params) = network();
        let frozen = |params: &ParamSet, name: &str| params.infos[params.index(name).expect(name)].frozen;
        freeze(&mut params, &Freeze::First(10), detector.head_row).expect("rows 0 to 9");
        assert!(frozen(&params, "model.9.cv1.conv.weight") && frozen(&params, "model.1.bn.running_mean"));
        assert!(!frozen(&params, "model.12.cv1.conv.weight"));
        let mixed = Freeze::Some { rows: vec![1], names: vec!["cv3.0".into()] };
        freeze(&mut params, &mixed, detector.head_row).expect("a row and a name");
        assert!(frozen(&params, "model.1.conv.weight") && frozen(&params, "model.22.cv3.0.2.bias"));
        assert!(!frozen(&params, "model.10.cv1.conv.weight".replace("10", "12").as_str()));
        for (bad, text) in [
            (Freeze::First(99), "row 23 does not exist"),
            (Freeze::Some { rows: vec![], names: vec!["nope".into()] }, "holds \"nope\""),
            (Freeze::First(23), "nothing is left"),
        ] {
            let error = freeze(&mut params, &bad, detector.head_row).expect_err("refused");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
