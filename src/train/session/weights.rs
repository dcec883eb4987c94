//! Weights files as this room sees them.

use std::collections::BTreeMap;
use std::path::Path;

/// One array.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// A weights file in memory.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    pub tensors: BTreeMap<String, Tensor>,
    pub names: Vec<String>,
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    pub fn architecture(&self) -> Option<String> {
        self.metadata.get("model").cloned()
    }
}

pub fn read(path: &Path) -> Result<Weights, std::io::Error> {
    let bytes = std::fs::read(path)?;
    let fault = |e: safetensors::SafeTensorError| std::io::Error::other(e.to_string());
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(fault)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(fault)?;
    let metadata: BTreeMap<String, String> =
        header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let names = metadata.get("names").and_then(|n| serde_json::from_str(n).ok()).unwrap_or_default();
    let mut tensors = BTreeMap::new();
    for (name, tensor) in file.tensors() {
        if tensor.dtype() == safetensors::Dtype::F32 {
            let data = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            tensors.insert(name, Tensor { shape: tensor.shape().to_vec(), data });
        }
    }
    Ok(Weights { tensors, names, metadata })
}
