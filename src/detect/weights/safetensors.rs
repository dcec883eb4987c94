//! Safetensors files: an eight-byte header length, a JSON header, raw little-endian data.
//!
//! Reading goes through the `safetensors` crate, which validates the header. Writing is done here, because two files
//! with equal content must be equal byte for byte: names and metadata are sorted.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use ::safetensors::{Dtype as FileDtype, SafeTensors};

use super::{Dtype, Tensor, TensorMap, WeightsError};

/// A tensor to be written, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// Little-endian bytes, row-major.
    pub bytes: &'a [u8],
}

impl Dtype {
    fn from_file(dtype: FileDtype) -> Option<Dtype> {
        Some(match dtype {
            FileDtype::BOOL => Dtype::Bool,
            FileDtype::U8 => Dtype::U8,
            FileDtype::I8 => Dtype::I8,
            FileDtype::I16 => Dtype::I16,
            FileDtype::F16 => Dtype::F16,
            FileDtype::BF16 => Dtype::Bf16,
            FileDtype::I32 => Dtype::I32,
            FileDtype::F32 => Dtype::F32,
            FileDtype::I64 => Dtype::I64,
            FileDtype::U64 => Dtype::U64,
            FileDtype::F64 => Dtype::F64,
            _ => return None,
        })
    }
}

/// Reads a file. Memory is bounded by the size of the file.
pub fn read_file(path: &Path) -> Result<TensorMap, WeightsError> {
    let bytes =
        std::fs::read(path).map_err(|source| WeightsError::Io { path: path.to_path_buf(), source })?;
    from_bytes(&bytes)
}

/// Largest header that [`read_texts`] reads, bytes.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// The texts that a file says of itself (class names, model), without its tensors. Nothing is checked of those.
///
/// # Errors
/// [`WeightsError`]: the file cannot be read or its header is none.
pub fn read_texts(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let fault = |reason: String| WeightsError::Safetensors { reason };
    let io = |source| WeightsError::Io { path: path.to_path_buf(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(fault(format!("the header has {length} bytes; allowed: {HEADER_BYTES_MAX}")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;
    #[derive(serde::Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        texts: BTreeMap<String, String>,
    }
    let header: Header = serde_json::from_slice(&header).map_err(|error| fault(error.to_string()))?;
    Ok(header.texts)
}

/// Reads the bytes of a file.
pub fn from_bytes(bytes: &[u8]) -> Result<TensorMap, WeightsError> {
    let fault = |e: ::safetensors::SafeTensorError| WeightsError::Safetensors { reason: e.to_string() };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(fault)?;
    let file = SafeTensors::deserialize(bytes).map_err(fault)?;
    let mut map = TensorMap::new();
    for (name, view) in file.iter() {
        let dtype = Dtype::from_file(view.dtype()).ok_or_else(|| WeightsError::Safetensors {
            reason: format!("tensor {name:?} has element type {:?}, which is not supported", view.dtype()),
        })?;
        let shape = view.shape().to_vec();
        let wanted = shape.iter().try_fold(dtype.bytes(), |n, side| n.checked_mul(*side));
        if wanted != Some(view.data().len()) {
            return Err(WeightsError::Safetensors {
                reason: format!("tensor {name:?} of shape {shape:?} has {} bytes", view.data().len()),
            });
        }
        map.insert(name, Tensor::new(dtype, shape, view.data().to_vec()));
    }
    if let Some(metadata) = header.metadata() {
        map.metadata.extend(metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    Ok(map)
}

/// Writes tensors and metadata. The order is fixed: widest elements first (so that data stays aligned), then by name.
pub fn write<'a>(
    out: &mut dyn Write,
    tensors: impl IntoIterator<Item = TensorRef<'a>>,
    metadata: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> std::io::Result<()> {
    let mut tensors: Vec<TensorRef<'a>> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| b.dtype.bytes().cmp(&a.dtype.bytes()).then(a.name.cmp(b.name)));
    let mut header = serde_json::Map::new();
    let mut metadata: Vec<_> = metadata.into_iter().collect();
    metadata.sort_unstable();
    if !metadata.is_empty() {
        let strings: serde_json::Map<_, _> =
            metadata.into_iter().map(|(key, value)| (key.to_string(), value.into())).collect();
        header.insert("__metadata__".to_string(), strings.into());
    }
    let mut offset = 0;
    for tensor in &tensors {
        let end = offset + tensor.bytes.len();
        assert_eq!(
            tensor.bytes.len(),
            tensor.shape.iter().product::<usize>() * tensor.dtype.bytes(),
            "bytes of tensor {:?}",
            tensor.name
        );
        let entry = serde_json::json!({
            "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end],
        });
        let earlier = header.insert(tensor.name.to_string(), entry);
        assert!(earlier.is_none(), "two tensors named {:?}", tensor.name);
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    tensors.iter().try_for_each(|tensor| out.write_all(tensor.bytes))
}

/// The bytes of a file that holds `map`.
pub fn to_bytes(map: &TensorMap) -> Vec<u8> {
    let tensors = map.tensors.iter().map(|(name, tensor)| TensorRef {
        name,
        dtype: tensor.dtype(),
        shape: tensor.shape(),
        bytes: tensor.bytes(),
    });
    let metadata = map.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let mut out = Vec::with_capacity(map.tensors.values().map(|t| t.bytes().len() + 128).sum());
    write(&mut out, tensors, metadata).expect("writing to memory does not fail");
    out
}

/// Writes `map` to a file. Not atomic: checkpoints are first written under a temporary name by their owner.
pub fn write_file(path: &Path, map: &TensorMap) -> Result<(), WeightsError> {
    std::fs::write(path, to_bytes(map))
        .map_err(|source| WeightsError::Io { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> TensorMap {
        let mut map = TensorMap::new();
        map.insert(
            "b.weight",
            Tensor::from_f32(vec![2, 3], &[1.0, -0.0, f32::NAN, 1e-40, 5.0, f32::INFINITY]),
        );
        map.insert("a.count", Tensor::from_i64(vec![], &[-7]));
        map.insert("c.mask", Tensor::from_u8(vec![3], vec![1, 0, 255]));
        map.insert("empty", Tensor::from_f32(vec![0, 4], &[]));
        map.metadata.insert("names".to_string(), "[\"ä\", \"b\\\"\"]".to_string());
        map.metadata.insert("epoch".to_string(), "3".to_string());
        map
    }

    #[test]
    fn what_is_written_is_read_back_and_bytes_are_reproducible() {
        let bytes = to_bytes(&sample());
        let back = from_bytes(&bytes).expect("valid");
        assert_eq!(to_bytes(&back), bytes);
        assert_eq!(back.metadata, sample().metadata);
        for (name, tensor) in &sample().tensors {
            let read = back.require(name).expect("present");
            assert_eq!(
                (read.dtype(), read.shape(), read.bytes()),
                (tensor.dtype(), tensor.shape(), tensor.bytes())
            );
        }
        assert!(back.require("nothing").is_err());
    }

    #[test]
    fn the_texts_are_read_without_the_tensors() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.safetensors");
        assert!(matches!(read_texts(&path), Err(WeightsError::Io { .. })));
        write_file(&path, &sample()).expect("written");
        let texts = read_texts(&path).expect("read");
        assert!(texts.iter().eq(sample().metadata.iter()), "{texts:?}");
        let bytes = to_bytes(&sample());
        let mut huge = bytes.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        for damaged in [&bytes[..4], &bytes[..40], &huge] {
            std::fs::write(&path, damaged).expect("written");
            assert!(read_texts(&path).is_err());
        }
        std::fs::write(&path, to_bytes(&TensorMap::new())).expect("written");
        assert!(read_texts(&path).expect("read").is_empty());
    }

    proptest! {
        #[test]
        fn damaged_files_give_errors_not_panics(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(),
            truncate in any::<bool>(),
        ) {
            let mut bytes = to_bytes(&sample());
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if truncate {
                bytes.truncate(cut.index(bytes.len()));
                prop_assert!(from_bytes(&bytes).is_err());
            } else {
                let _ = from_bytes(&bytes);
            }
        }
    }
}
