//! A trained network, read from its weights file.

use std::path::Path;

use super::error::TrainError;
use crate::detect::models::{Detector, available};
use crate::detect::weights::{TensorMap, pytorch, safetensors};
use crate::engine::params::ParamSet;

/// Smallest input that a network is built for, pixels; the parameters are the same at any size.
const SIDE_MIN: usize = 64;

/// Network, parameters, class names.
#[derive(Clone, Debug)]
pub struct TrainedModel {
    /// Name of the network, for example `yolov8n`.
    pub model: String,
    /// Class names; the class's number where the file has no names.
    pub names: Vec<String>,
    /// Image size it was trained at, pixels, where the file says so.
    pub imgsz: Option<usize>,
    /// All parameters and running statistics.
    pub params: ParamSet,
}

impl TrainedModel {
    /// Number of classes.
    pub fn nc(&self) -> usize {
        self.names.len()
    }

    /// Reads a weights file: safetensors, or a checkpoint of the reference where the name ends in `.pt`.
    ///
    /// Which network it is and how many classes it has is seen from the arrays themselves, so that files from
    /// elsewhere, without metadata, can be read too.
    ///
    /// # Errors
    /// [`TrainError::Weights`] when the file cannot be read, is no weights file or not of a network that this
    /// program has, or when an array is missing or has another shape.
    pub fn read(path: &Path) -> Result<TrainedModel, TrainError> {
        let (arrays, names) = arrays_and_names(path)?;
        let (detector, nc) = recognise(path, &arrays)?;
        let mut params = ParamSet::new(&detector.graph);
        let wanted: Vec<String> = params.infos.iter().map(|p| p.name.clone()).collect();
        for name in wanted {
            let array = arrays.get(&name).ok_or_else(|| fault(path, format!("array {name} is missing")))?;
            let imported = params.import(&name, array.shape(), &array.to_f32());
            imported.map_err(|e| caused(path, format!("array {name} does not fit {}", detector.name), e))?;
        }
        let names = match names {
            Some(names) if names.len() == nc => names,
            Some(names) => return Err(fault(path, format!("{} names for {nc} classes", names.len()))),
            None => (0..nc).map(|class| class.to_string()).collect(),
        };
        let imgsz = arrays.metadata.get("imgsz").and_then(|text| text.parse().ok()).filter(|side| *side > 0);
        Ok(TrainedModel { model: detector.name, names, imgsz, params })
    }
}

/// The arrays of a file and, where it has them, its class names.
fn arrays_and_names(path: &Path) -> Result<(TensorMap, Option<Vec<String>>), TrainError> {
    let unreadable = |e| caused(path, "it cannot be read as weights".into(), e);
    if path.extension().is_some_and(|suffix| suffix.eq_ignore_ascii_case("pt")) {
        let checkpoint = pytorch::read_file(path).map_err(unreadable)?;
        let names = Some(checkpoint.class_names).filter(|names| !names.is_empty());
        return Ok((checkpoint.tensors, names));
    }
    let arrays = safetensors::read_file(path).map_err(unreadable)?;
    let names = arrays.metadata.get("names").and_then(|text| class_names(text));
    Ok((arrays, names))
}

fn caused(
    path: &Path,
    message: String,
    source: impl std::error::Error + Send + Sync + 'static,
) -> TrainError {
    TrainError::Weights { path: path.to_owned(), message, source: Some(Box::new(source)) }
}

fn fault(path: &Path, message: String) -> TrainError {
    TrainError::Weights { path: path.to_owned(), message, source: None }
}

/// The network whose arrays these are: the first convolution's width tells the scale, the last bias of the
/// class branch the number of classes.
fn recognise(path: &Path, arrays: &TensorMap) -> Result<(Detector, usize), TrainError> {
    let first = "model.0.conv.weight";
    let width = arrays.get(first).and_then(|a| a.shape().first().copied());
    let Some(width) = width else {
        return Err(fault(path, format!("array {first} is missing: not the weights of a detector")));
    };
    for name in available() {
        let smallest = |nc| {
            Detector::build(name, nc, SIDE_MIN, SIDE_MIN)
                .map_err(|e| caused(path, format!("{name} cannot be built for it"), e))
        };
        let detector = smallest(1)?;
        let bias = format!("model.{}.cv3.0.2.bias", detector.head_row);
        let Some(nc) = arrays.get(&bias).and_then(|a| a.shape().first().copied()) else { continue };
        let first = detector.graph.params.iter().find(|p| p.name == first).map(|p| p.kind.shape()[0]);
        if first == Some(width) {
            return Ok((smallest(nc)?, nc));
        }
    }
    let known = available().join(", ");
    Err(fault(path, format!("it fits none of the networks of this program ({known})")))
}

/// Class names as a JSON list, or as an object from number to name.
fn class_names(text: &str) -> Option<Vec<String>> {
    if let Ok(list) = serde_json::from_str::<Vec<String>>(text) {
        return Some(list);
    }
    let map: std::collections::BTreeMap<usize, String> = serde_json::from_str(text).ok()?;
    map.keys().copied().eq(0..map.len()).then(|| map.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::weights_file::{Metadata, write};

    fn written(nc: usize, names: &str) -> (tempfile::TempDir, std::path::PathBuf, ParamSet) {
        let detector = Detector::build("yolov8s", nc, 64, 64).expect("a shipped model");
        let mut params = ParamSet::new(&detector.graph);
        params.values.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 97) as f32 * 0.01);
        params.buffers.iter_mut().enumerate().for_each(|(i, v)| *v = 1.0 + (i % 13) as f32);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("w.safetensors");
        let metadata = Metadata::from([("names".into(), names.into()), ("imgsz".into(), "320".into())]);
        write(&path, &detector, &params, &params.values, &params.buffers, &metadata).expect("written");
        (folder, path, params)
    }

    #[test]
    fn a_weights_file_is_recognised_and_read_back() {
        let (_folder, path, params) = written(3, r#"["a","b","c"]"#);
        let model = TrainedModel::read(&path).expect("readable");
        assert_eq!((model.model.as_str(), model.nc(), model.imgsz), ("yolov8s", 3, Some(320)));
        assert_eq!(model.names, ["a", "b", "c"]);
        for info in &params.infos {
            assert_eq!(model.params.export(&info.name).ok(), params.export(&info.name).ok(), "{}", info.name);
        }
    }

    #[test]
    fn names_are_a_list_an_object_or_absent() {
        let (_folder, path, _) = written(2, r#"{"0":"x","1":"y"}"#);
        assert_eq!(TrainedModel::read(&path).expect("readable").names, ["x", "y"]);
        let (_folder, path, _) = written(2, "none of these");
        assert_eq!(TrainedModel::read(&path).expect("readable").names, ["0", "1"]);
        let (_folder, path, _) = written(2, r#"["only one"]"#);
        let error = TrainedModel::read(&path).expect_err("refused").to_string();
        assert!(error.contains("1 names for 2 classes"), "{error}");
    }

    #[test]
    fn what_is_no_weights_file_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("w.safetensors");
        let refused = || TrainedModel::read(&path).expect_err("refused").chain();
        assert!(refused().contains("cannot be accessed"));
        for bytes in [&b""[..], b"PK\x03\x04 a zip", &[0xff; 64], &[8, 0, 0, 0, 0, 0, 0, 0, b'{']] {
            std::fs::write(&path, bytes).expect("written");
            assert!(refused().contains("not a valid safetensors file"), "{bytes:?}");
        }
        let (_folder, whole, _) = written(1, "[]");
        let bytes = std::fs::read(&whole).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
        assert!(refused().contains("not a valid safetensors file"));
    }
}
