//! Weights files of a run: safetensors with the reference's parameter names.

use std::collections::BTreeMap;
use std::path::Path;

use super::error::TrainError;
use super::files;
use crate::detect::models::Detector;
use crate::detect::weights::Dtype;
use crate::detect::weights::safetensors::{self, TensorRef};
use crate::engine::params::{ParamKind, ParamSet, to_reference};

/// What a weights file says about itself; all values are text.
pub type Metadata = BTreeMap<String, String>;

/// Writes the network with the given parameters and running statistics, f32, names and shapes as the
/// reference's state dict has them, the constant of the distance decoder and the (unused, zero) batch
/// counters of the normalisations included. The same content gives the same bytes.
///
/// # Errors
/// [`TrainError::Storage`].
pub fn write(
    path: &Path,
    detector: &Detector,
    layout: &ParamSet,
    values: &[f32],
    buffers: &[f32],
    metadata: &Metadata,
) -> Result<(), TrainError> {
    let mut arrays: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for info in &layout.infos {
        let stored = if info.kind.is_buffer() { buffers } else { values };
        let numbers = to_reference(&info.kind, &stored[info.range.clone()]);
        let bytes = bytemuck::cast_slice(&numbers).to_vec();
        arrays.push((info.name.clone(), Dtype::F32, info.kind.shape(), bytes));
        if let ParamKind::RunningVar { .. } = info.kind {
            let counter = info.name.replace("running_var", "num_batches_tracked");
            arrays.push((counter, Dtype::I64, Vec::new(), vec![0; 8]));
        }
    }
    let (name, shape, numbers) = detector.dfl_constant();
    arrays.push((name, Dtype::F32, shape, bytemuck::cast_slice(&numbers).to_vec()));
    let tensors =
        arrays.iter().map(|(name, dtype, shape, bytes)| TensorRef { name, dtype: *dtype, shape, bytes });
    let texts = metadata.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    files::write_atomically(path, |mut out| safetensors::write(&mut out, tensors, texts))
}

/// Reads the parameters and running statistics of a file that [`write()`] made back into `params`.
///
/// # Errors
/// [`TrainError::Weights`] when the file is not one of these or belongs to another network.
pub fn read(path: &Path, params: &mut ParamSet) -> Result<(), TrainError> {
    let fault = |message: String| TrainError::Weights { path: path.to_owned(), message, source: None };
    let file = safetensors::read_file(path).map_err(|e| fault(e.to_string()))?;
    for index in 0..params.infos.len() {
        let name = params.infos[index].name.clone();
        let tensor = file.require(&name).map_err(|e| fault(e.to_string()))?;
        let numbers = tensor.to_f32();
        params.import(&name, tensor.shape(), &numbers).map_err(|e| fault(e.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_the_reference_state_dict() {
        let detector = Detector::build("yolov8n", 80, 64, 64).expect("a shipped model");
        let mut params = ParamSet::new(&detector.graph);
        params.values.iter_mut().enumerate().for_each(|(i, v)| *v = i as f32);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("best.safetensors");
        let metadata = Metadata::from([("nc".to_owned(), "80".to_owned())]);
        write(&path, &detector, &params, &params.values, &params.buffers, &metadata).expect("written");
        let bytes = std::fs::read(&path).expect("read");
        let file = ::safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        // The number of entries of the reference's state dict for this network.
        assert_eq!(file.len(), 355);
        let mut again = ParamSet::new(&detector.graph);
        read(&path, &mut again).expect("its own file");
        let names = params.infos.iter().map(|i| i.name.as_str());
        for name in names {
            assert_eq!(again.export(name).expect(name), params.export(name).expect(name));
        }
        let tensor = file.tensor("model.0.conv.weight").expect("the first convolution");
        assert_eq!(tensor.shape(), [16, 3, 3, 3]);
        let (_, expected) = params.export("model.0.conv.weight").expect("a parameter");
        assert_eq!(tensor.data(), bytemuck::cast_slice::<f32, u8>(&expected));
        let (_, header) = ::safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
        assert_eq!(header.metadata().as_ref().expect("metadata")["nc"], "80");
    }
}
