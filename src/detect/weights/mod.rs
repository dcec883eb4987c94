//! Weights in and out: named tensors, safetensors files, the reference's checkpoints, transfer between models.

pub mod pickle;
pub mod pytorch;
pub mod safetensors;
pub mod transfer;

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// Boolean, one byte.
    Bool,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 16-bit integer.
    I16,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 32-bit integer.
    I32,
    /// Single precision.
    F32,
    /// 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// Double precision.
    F64,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bool | Dtype::U8 | Dtype::I8 => 1,
            Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I32 | Dtype::F32 => 4,
            Dtype::I64 | Dtype::U64 | Dtype::F64 => 8,
        }
    }

    /// Name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "BOOL",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::I16 => "I16",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::I32 => "I32",
            Dtype::F32 => "F32",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
            Dtype::F64 => "F64",
        }
    }

    /// Reads element `index` of little-endian `bytes` as a double.
    fn read(self, bytes: &[u8], index: usize) -> f64 {
        fn at<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
            bytes.as_chunks::<N>().0[index]
        }
        match self {
            Dtype::Bool | Dtype::U8 => bytes[index] as f64,
            Dtype::I8 => bytes[index] as i8 as f64,
            Dtype::I16 => i16::from_le_bytes(at(bytes, index)) as f64,
            Dtype::F16 => half::f16::from_le_bytes(at(bytes, index)).to_f64(),
            Dtype::Bf16 => half::bf16::from_le_bytes(at(bytes, index)).to_f64(),
            Dtype::I32 => i32::from_le_bytes(at(bytes, index)) as f64,
            Dtype::F32 => f32::from_le_bytes(at(bytes, index)) as f64,
            Dtype::I64 => i64::from_le_bytes(at(bytes, index)) as f64,
            Dtype::U64 => u64::from_le_bytes(at(bytes, index)) as f64,
            Dtype::F64 => f64::from_le_bytes(at(bytes, index)),
        }
    }
}

/// A dense tensor: type, shape, little-endian bytes in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor over raw little-endian bytes; the shape must account for all of them.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Tensor {
        let elements = shape.iter().product::<usize>();
        assert_eq!(
            bytes.len(),
            elements * dtype.bytes(),
            "{shape:?} of {} in {} bytes",
            dtype.name(),
            bytes.len()
        );
        Tensor { dtype, shape, bytes }
    }

    /// A single-precision tensor.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Tensor {
        let mut bytes = Vec::with_capacity(values.len() * 4);
        values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
        Tensor::new(Dtype::F32, shape, bytes)
    }

    /// A tensor of 64-bit integers.
    pub fn from_i64(shape: Vec<usize>, values: &[i64]) -> Tensor {
        Tensor::new(Dtype::I64, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A tensor of bytes.
    pub fn from_u8(shape: Vec<usize>, values: Vec<u8>) -> Tensor {
        Tensor::new(Dtype::U8, shape, values)
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Shape; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// Raw bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values as single precision (bit-exact if that is what they are).
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => {
                let halves = self.bytes.as_chunks::<2>().0;
                halves.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
            }
            dtype => (0..self.elements()).map(|i| dtype.read(&self.bytes, i) as f32).collect(),
        }
    }

    /// The values of a tensor of 64-bit integers, else `None`.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        (self.dtype == Dtype::I64)
            .then(|| self.bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
    }
}

/// Tensors by name, and strings by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorMap {
    /// The tensors; convolution weights in the order of the file formats, `[out][in][height][width]`.
    pub tensors: BTreeMap<String, Tensor>,
    /// Free strings stored with them.
    pub metadata: BTreeMap<String, String>,
}

impl TensorMap {
    /// An empty map.
    pub fn new() -> TensorMap {
        TensorMap::default()
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor of that name, or an error that says so.
    pub fn require(&self, name: &str) -> Result<&Tensor, WeightsError> {
        self.get(name).ok_or_else(|| WeightsError::Missing { name: name.to_string() })
    }
}

/// What can go wrong with a weights file.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file could not be read or written.
    #[error("weights file {} cannot be accessed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The bytes are not a safetensors file.
    #[error("not a valid safetensors file: {reason}")]
    Safetensors {
        /// What is wrong.
        reason: String,
    },
    /// The bytes are not a checkpoint archive that can be read.
    #[error("not a readable checkpoint archive: {reason}")]
    Archive {
        /// What is wrong.
        reason: String,
    },
    /// The object stream inside a checkpoint is malformed or uses something that is not allowed.
    #[error("checkpoint object stream, byte {offset}: {reason}")]
    Pickle {
        /// Position in the stream.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint is well-formed but holds no model.
    #[error("checkpoint holds no usable model: {reason}")]
    Model {
        /// What is missing.
        reason: String,
    },
    /// A tensor of the checkpoint contradicts its storage.
    #[error("tensor {name:?} of the checkpoint: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A named tensor is not there.
    #[error("no tensor named {name:?}")]
    Missing {
        /// The name.
        name: String,
    },
    /// Something is larger than allowed.
    #[error("{what} exceeds the limit of {limit}")]
    Limit {
        /// What.
        what: String,
        /// The limit.
        limit: usize,
    },
}
