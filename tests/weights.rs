//! The reference's checkpoints: real files, and damaged ones.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use boxwright::detect::weights::pytorch::{self, Checkpoint};
use boxwright::detect::weights::{Dtype, WeightsError, pickle::Pickle, safetensors};
use proptest::prelude::*;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn parse(bytes: &[u8]) -> Result<Checkpoint, WeightsError> {
    pytorch::read(Cursor::new(bytes), bytes.len() as u64)
}

#[test]
fn running_checkpoint_gives_the_averaged_weights_under_their_state_dict_names() {
    let checkpoint = pytorch::read_file(&data("tiny_checkpoint.pt")).expect("readable");
    let expected = safetensors::read_file(&data("tiny_checkpoint.safetensors")).expect("readable");
    assert_eq!(checkpoint.entry, "ema");
    assert_eq!(checkpoint.tensors.tensors, expected.tensors);
    assert_eq!(checkpoint.class_names, ["red cell", "platelet"]);
    assert_eq!(checkpoint.nc, Some(2));
    assert_eq!(checkpoint.epoch, Some(4));
    let table = checkpoint.model_table.expect("a table");
    assert_eq!(table["nc"], 2);
    assert_eq!(table["backbone"][2][2], "C2f");
    let arguments = checkpoint.train_args.expect("arguments");
    assert_eq!(arguments["data"], "cells.yaml");
    assert_eq!(arguments["scale"], 0.5);
    assert!(arguments["classes"].is_null());
}

#[test]
fn bare_tensors_of_every_type_views_and_shared_storages() {
    let checkpoint = pytorch::read_file(&data("tensors.pt")).expect("readable");
    let get = |name: &str| checkpoint.tensors.require(name).expect("present").clone();
    let ramp: Vec<f32> = (0..24).map(|v| v as f32).collect();
    for name in ["whole", "half", "bf16"] {
        assert_eq!((get(name).shape(), get(name).to_f32()), (&[4, 6][..], ramp.clone()), "{name}");
    }
    for name in ["int", "long", "u8", "bool"] {
        assert_eq!(get(name).dtype(), Dtype::I64, "{name}");
    }
    assert_eq!(get("int").to_i64().expect("integers"), (0..24).collect::<Vec<i64>>());
    assert_eq!(get("bool").to_f32(), ramp.iter().map(|v| f32::from(*v > 5.0)).collect::<Vec<_>>());
    let transposed: Vec<f32> = (0..6).flat_map(|c| (0..4).map(move |r| (r * 6 + c) as f32)).collect();
    assert_eq!((get("transposed").shape(), get("transposed").to_f32()), (&[6, 4][..], transposed));
    assert_eq!(get("slice").to_f32(), [8.0, 9.0, 10.0, 14.0, 15.0, 16.0]);
    assert_eq!(get("double").to_f32()[23], (23.0f64 / 3.0) as f32);
    assert_eq!((get("scalar").shape(), get("scalar").to_f32()), (&[][..], vec![2.5]));
    assert_eq!(get("empty").shape(), [0, 3]);
    assert_eq!(get("param").to_f32(), ramp[..6]);
}

#[test]
fn files_that_are_no_checkpoints_are_refused_by_name() {
    assert!(matches!(pytorch::read_file(&data("nothing.pt")), Err(WeightsError::Io { .. })));
    assert!(matches!(parse(b""), Err(WeightsError::Archive { .. })));
    assert!(matches!(parse(b"not a zip at all, just a sentence"), Err(WeightsError::Archive { .. })));
    let safetensors = std::fs::read(data("tiny_checkpoint.safetensors")).expect("readable");
    assert!(matches!(parse(&safetensors), Err(WeightsError::Archive { .. })));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = std::fs::read(data("tensors.pt")).expect("readable");
    for length in (0..bytes.len()).step_by(7) {
        assert!(parse(&bytes[..length]).is_err(), "{length} bytes");
    }
}

/// Position of the object stream inside the archive.
fn stream_range(bytes: &[u8]) -> std::ops::Range<usize> {
    let start = bytes.windows(3).position(|w| w == b"\x80\x02}").expect("the stream begins");
    start..(start + 1500).min(bytes.len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_checkpoints_give_errors_or_tensors_never_panics(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        in_stream in any::<bool>(),
    ) {
        let mut bytes = std::fs::read(data("tensors.pt")).expect("readable");
        let range = if in_stream { stream_range(&bytes) } else { 0..bytes.len() };
        for (at, value) in changes {
            bytes[range.start + at.index(range.len())] = value;
        }
        let _ = parse(&bytes);
    }

    #[test]
    fn damaged_object_streams_give_errors_or_objects_never_panics(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..10),
        cut in any::<prop::sample::Index>(),
    ) {
        // Below the archive's checksum, which catches most damage before the interpreter sees it.
        let whole = std::fs::read(data("tiny_checkpoint.pt")).expect("readable");
        let start = stream_range(&whole).start;
        let mut stream = whole[start..start + 16_000].to_vec();
        for (at, value) in changes {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        let _ = Pickle::parse(&stream);
        stream.truncate(cut.index(stream.len()));
        let _ = Pickle::parse(&stream);
    }
}

/// A stored (uncompressed) archive with fresh checksums, so that damage reaches the reader behind them.
fn repack(stream: &[u8]) -> Vec<u8> {
    use std::io::{Read, Write};
    let bytes = std::fs::read(data("tensors.pt")).expect("readable");
    let mut from = zip::ZipArchive::new(Cursor::new(bytes)).expect("an archive");
    let mut to = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..from.len() {
        let mut member = from.by_index(index).expect("a member");
        let name = member.name().to_string();
        let mut content = Vec::new();
        member.read_to_end(&mut content).expect("readable");
        to.start_file(name.clone(), options).expect("started");
        to.write_all(if name.ends_with("data.pkl") { stream } else { &content }).expect("written");
    }
    to.finish().expect("finished").into_inner()
}

fn tensors_stream() -> Vec<u8> {
    use std::io::Read;
    let bytes = std::fs::read(data("tensors.pt")).expect("readable");
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).expect("an archive");
    let mut member = archive.by_name("tensors/data.pkl").expect("the stream");
    let mut out = Vec::new();
    member.read_to_end(&mut out).expect("readable");
    out
}

#[test]
fn repacked_archive_still_reads() {
    assert_eq!(parse(&repack(&tensors_stream())).expect("readable").tensors.tensors.len(), 13);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn damage_behind_the_checksum_gives_errors_or_tensors_never_panics(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut stream = tensors_stream();
        for (at, value) in changes {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        let _ = parse(&repack(&stream));
    }
}
