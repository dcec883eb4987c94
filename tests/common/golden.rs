//! Golden vectors: arrays computed by the reference implementation, one safetensors file per subject.
//!
//! The directory is `BOXWRIGHT_GOLDEN` if that is set, else `tests/golden` of the crate. Shapes, counts and
//! parameters are always taken from the file: the tests also run on other files of the same form.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// One array of a golden file, converted to `f32`.
#[derive(Clone, Debug)]
pub struct GoldenArray {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

#[derive(Debug)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// One golden file, held in memory.
pub struct Golden {
    path: PathBuf,
    bytes: Vec<u8>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, Value>,
}

/// The directory that holds the golden files.
pub fn directory() -> PathBuf {
    match std::env::var_os("BOXWRIGHT_GOLDEN") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("golden"),
    }
}

impl Golden {
    /// Opens `<directory>/<name>.safetensors`; panics with the path when it is absent or malformed.
    pub fn open(name: &str) -> Golden {
        let path = directory().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path)
            .unwrap_or_else(|e| panic!("golden file {} cannot be read: {e}", path.display()));
        let header_len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..8 + header_len])
            .unwrap_or_else(|e| panic!("golden file {}: bad header: {e}", path.display()));
        let data = 8 + header_len;
        let mut entries = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (key, value) in header {
            if key == "__metadata__" {
                for (name, text) in value.as_object().expect("metadata is an object") {
                    let text = text.as_str().expect("metadata values are strings");
                    // A value that is not JSON (a plain sentence) stays a string.
                    let parsed =
                        serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()));
                    metadata.insert(name.clone(), parsed);
                }
                continue;
            }
            let usizes = |v: &Value| -> Vec<usize> {
                v.as_array().expect("array").iter().map(|x| x.as_u64().expect("integer") as usize).collect()
            };
            let offsets = usizes(&value["data_offsets"]);
            entries.insert(
                key,
                Entry {
                    dtype: value["dtype"].as_str().expect("dtype").to_string(),
                    shape: usizes(&value["shape"]),
                    range: data + offsets[0]..data + offsets[1],
                },
            );
        }
        Golden { path, bytes, entries, metadata }
    }

    fn entry(&self, name: &str) -> &Entry {
        self.entries.get(name).unwrap_or_else(|| panic!("{} has no array {name:?}", self.path.display()))
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all arrays, sorted.
    pub fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    /// Names (whole) of the arrays that start with `prefix`, sorted.
    pub fn with_prefix(&self, prefix: &str) -> Vec<String> {
        self.entries.keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }

    /// True when the file holds `name`.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shape of an array; empty for a scalar.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.entry(name).shape.clone()
    }

    /// Element type as the file names it: `F32`, `F64`, `I64`, `U8`, ...
    pub fn dtype(&self, name: &str) -> &str {
        &self.entry(name).dtype
    }

    /// Raw little-endian bytes of an array.
    pub fn raw(&self, name: &str) -> &[u8] {
        &self.bytes[self.entry(name).range.clone()]
    }

    /// Any numeric array as `f64`.
    pub fn f64(&self, name: &str) -> Vec<f64> {
        let raw = self.raw(name);
        match self.dtype(name) {
            "F32" => raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b) as f64).collect(),
            "F64" => raw.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            "I64" => raw.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            "I32" => raw.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f64).collect(),
            "U8" | "BOOL" => raw.iter().map(|&b| b as f64).collect(),
            other => panic!("{name}: element type {other} is not supported by the golden loader"),
        }
    }

    /// Any numeric array as `f32` (bit-exact for `F32`).
    pub fn f32(&self, name: &str) -> Vec<f32> {
        if self.dtype(name) == "F32" {
            return self.raw(name).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        }
        self.f64(name).into_iter().map(|v| v as f32).collect()
    }

    /// An integer array; panics when the file holds a value with a fraction.
    pub fn i64(&self, name: &str) -> Vec<i64> {
        if self.dtype(name) == "I64" {
            return self.raw(name).as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        }
        let whole = |v: f64| {
            assert!(v.fract() == 0.0, "{name}: {v} is not an integer");
            v as i64
        };
        self.f64(name).into_iter().map(whole).collect()
    }

    /// An array of bytes or booleans.
    pub fn u8(&self, name: &str) -> Vec<u8> {
        self.i64(name).into_iter().map(|v| u8::try_from(v).expect("value fits a byte")).collect()
    }

    /// The single value of a scalar (or one-element) array.
    pub fn scalar(&self, name: &str) -> f64 {
        let values = self.f64(name);
        assert_eq!(values.len(), 1, "{name} is not a scalar");
        values[0]
    }

    /// Shape and `f32` values of an array.
    pub fn array(&self, name: &str) -> GoldenArray {
        GoldenArray { shape: self.shape(name), data: self.f32(name) }
    }

    /// Metadata value (parsed JSON); panics when absent.
    pub fn meta(&self, key: &str) -> &Value {
        self.metadata.get(key).unwrap_or_else(|| panic!("{} has no metadata {key:?}", self.path.display()))
    }

    /// Metadata value, if present.
    pub fn meta_opt(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Metadata number.
    pub fn meta_f64(&self, key: &str) -> f64 {
        self.meta(key).as_f64().unwrap_or_else(|| panic!("metadata {key:?} is not a number"))
    }

    /// Metadata non-negative integer.
    pub fn meta_usize(&self, key: &str) -> usize {
        self.meta(key).as_u64().unwrap_or_else(|| panic!("metadata {key:?} is not an integer")) as usize
    }
}
