//! Copying weights from one model into another, possibly with other classes.

use std::collections::HashMap;

use super::{Tensor, TensorMap};

/// What became of each tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TransferReport {
    /// Copied whole: name and shape agree.
    pub copied: Vec<String>,
    /// Copied row by row, by class name.
    pub remapped: Vec<String>,
    /// Left as they were: the source has no tensor of that name.
    pub missing: Vec<String>,
    /// Left as they were: the shapes differ (name, source shape, target shape).
    pub mismatched: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors of the source that the target does not have.
    pub unused: Vec<String>,
    /// Classes that were found by name: (source index, target index).
    pub classes: Vec<(usize, usize)>,
}

/// Copies every tensor of `source` whose name and shape agree into `target`; the others keep their values.
///
/// With `cls_remap`, if class names occur in both lists (compared without case and surrounding blanks; placeholders
/// such as "0", "1" do not count), the last class convolutions are copied row by row, by class name, and rows of classes
/// that the source does not know keep their values. Equal lists are copied whole.
pub fn transfer(
    source: &TensorMap,
    source_names: &[String],
    target: &mut TensorMap,
    target_names: &[String],
    cls_remap: bool,
) -> TransferReport {
    let mut report = TransferReport::default();
    if cls_remap && source_names != target_names {
        report.classes = shared_classes(source_names, target_names);
    }
    for (name, into) in &mut target.tensors {
        let Some(from) = source.get(name) else {
            report.missing.push(name.clone());
            continue;
        };
        let by_class = !report.classes.is_empty()
            && is_class_output(name)
            && from.dtype() == into.dtype()
            && from.shape().first() == Some(&source_names.len())
            && into.shape().first() == Some(&target_names.len())
            && from.shape()[1..] == into.shape()[1..];
        if by_class {
            *into = copy_rows(from, into, &report.classes);
            report.remapped.push(name.clone());
        } else if from.shape() == into.shape() && from.dtype() == into.dtype() {
            *into = from.clone();
            report.copied.push(name.clone());
        } else {
            report.mismatched.push((name.clone(), from.shape().to_vec(), into.shape().to_vec()));
        }
    }
    report.unused = source.tensors.keys().filter(|name| target.get(name).is_none()).cloned().collect();
    report
}

/// Hidden width of the class branch of a detection head, from its weights; `None` if there is no such head.
///
/// It depends on the number of classes a model was first built for; a model that takes over such weights is built with
/// the source's width.
pub fn class_branch_width(source: &TensorMap) -> Option<usize> {
    let (_, weight) = source.tensors.iter().find(|(name, _)| name.ends_with(".cv3.0.2.weight"))?;
    weight.shape().get(1).copied()
}

/// Pairs (source index, target index) of classes with one name.
fn shared_classes(source_names: &[String], target_names: &[String]) -> Vec<(usize, usize)> {
    let key = |name: &String| name.trim().to_lowercase();
    let is_placeholder = |key: &str| !key.is_empty() && key.bytes().all(|b| b.is_ascii_digit());
    let mut index_of: HashMap<String, usize> = HashMap::new();
    for (index, name) in source_names.iter().enumerate() {
        index_of.entry(key(name)).or_insert(index);
    }
    let found = target_names.iter().enumerate().filter_map(|(index, name)| {
        let key = key(name);
        let source = *index_of.get(&key).filter(|_| !is_placeholder(&key))?;
        Some((source, index))
    });
    found.collect()
}

/// The convolutions whose output channels are the classes: `….cv3.<level>.2.{weight,bias}`, also of a second branch.
fn is_class_output(name: &str) -> bool {
    let parts: Vec<&str> = name.rsplitn(5, '.').collect();
    matches!(parts.as_slice(), ["weight" | "bias", "2", level, "cv3" | "one2one_cv3", _]
        if level.bytes().all(|b| b.is_ascii_digit()))
}

fn copy_rows(from: &Tensor, into: &Tensor, classes: &[(usize, usize)]) -> Tensor {
    let row = into.bytes().len() / into.shape()[0].max(1);
    let mut bytes = into.bytes().to_vec();
    for &(source, target) in classes {
        bytes[target * row..][..row].copy_from_slice(&from.bytes()[source * row..][..row]);
    }
    Tensor::new(into.dtype(), into.shape().to_vec(), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    fn model(nc: usize, base: f32) -> TensorMap {
        let mut map = TensorMap::new();
        let ramp = |n: usize| (0..n).map(|i| base + i as f32).collect::<Vec<_>>();
        map.insert("model.0.conv.weight", Tensor::from_f32(vec![2, 3], &ramp(6)));
        map.insert("model.22.cv3.0.2.weight", Tensor::from_f32(vec![nc, 2, 1, 1], &ramp(nc * 2)));
        map.insert("model.22.cv3.0.2.bias", Tensor::from_f32(vec![nc], &ramp(nc)));
        map
    }

    #[test]
    fn class_rows_follow_their_names() {
        let source = model(3, 100.0);
        let mut target = model(2, 0.0);
        let report =
            transfer(&source, &names(&["cat", "dog", "bird"]), &mut target, &names(&[" Bird", "fish"]), true);
        assert_eq!(report.classes, [(2, 0)]);
        assert_eq!(report.copied, ["model.0.conv.weight"]);
        assert_eq!(report.remapped.len(), 2);
        assert_eq!(target.tensors["model.22.cv3.0.2.bias"].to_f32(), [102.0, 1.0]);
        assert_eq!(target.tensors["model.22.cv3.0.2.weight"].to_f32(), [104.0, 105.0, 2.0, 3.0]);
        assert_eq!(class_branch_width(&source), Some(2));
    }

    #[test]
    fn placeholders_and_disabled_remapping_copy_by_shape_only() {
        let source = model(3, 100.0);
        for (list, remap) in [(["0", "1"], true), (["dog", "cat"], false)] {
            let mut target = model(2, 0.0);
            let source_names = if remap { names(&["0", "1", "2"]) } else { names(&["cat", "dog", "bird"]) };
            let report = transfer(&source, &source_names, &mut target, &names(&list), remap);
            assert!(report.classes.is_empty() && report.remapped.is_empty());
            assert_eq!(report.mismatched.len(), 2);
            assert_eq!(target.tensors["model.22.cv3.0.2.bias"].to_f32(), [0.0, 1.0]);
        }
        let mut target = model(3, 0.0);
        target.insert("extra", Tensor::from_i64(vec![1], &[1]));
        let report = transfer(&source, &names(&["a", "b", "c"]), &mut target, &names(&["x", "y", "z"]), true);
        assert_eq!((report.copied.len(), report.missing.as_slice()), (3, &["extra".to_string()][..]));
    }
}
