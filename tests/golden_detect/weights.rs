//! Weights through files: what is written is what is read, bit for bit.

use boxwright::detect::weights::{Dtype, Tensor, TensorMap, safetensors};

use crate::common::{Golden, assert_exact};

fn dtype(name: &str) -> Dtype {
    match name {
        "F32" => Dtype::F32,
        "F64" => Dtype::F64,
        "I64" => Dtype::I64,
        "U8" => Dtype::U8,
        other => panic!("element type {other}"),
    }
}

#[test]
fn golden_state_dict_survives_a_weights_file_bitwise() {
    let golden = Golden::open("yolov8_tiny");
    let names = golden.with_prefix("sd.");
    assert!(!names.is_empty());
    let mut map = TensorMap::new();
    for name in &names {
        let tensor = Tensor::new(dtype(golden.dtype(name)), golden.shape(name), golden.raw(name).to_vec());
        map.insert(name.trim_start_matches("sd."), tensor);
    }
    map.metadata.insert("nc".to_string(), golden.meta_usize("nc").to_string());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("weights.safetensors");
    safetensors::write_file(&path, &map).expect("written");
    let back = safetensors::read_file(&path).expect("read");
    assert_eq!(back.metadata, map.metadata);
    assert_eq!(back.tensors.len(), names.len());
    for name in &names {
        let tensor = back.require(name.trim_start_matches("sd.")).expect("present");
        assert_eq!(tensor.shape(), golden.shape(name));
        assert_exact(name, tensor.bytes(), golden.raw(name));
        if golden.dtype(name) == "F32" {
            assert_exact(name, &tensor.to_f32(), &golden.f32(name));
        }
    }
}

#[test]
fn golden_file_is_read_whole_by_the_weights_reader() {
    let golden = Golden::open("yolov8_tiny");
    let map = safetensors::read_file(golden.path()).expect("read");
    assert_eq!(map.tensors.keys().cloned().collect::<Vec<_>>(), golden.names());
    assert!(map.metadata.contains_key("config"));
}
