use proptest::prelude::*;

use super::*;
use crate::engine::device::cuda::{Chip, Precision};
use crate::engine::ops::conv2d::Conv2dParams;
use crate::engine::ops::conv2d::cuda::{Case, Method, MmaConfig, Pass, Shape};
use crate::engine::tensor::View;

fn sample(iteration: u64) -> Checkpoint {
    let numbers = |n: usize, k: f32| (0..n).map(|i| (i as f32 * k).sin()).collect::<Vec<_>>();
    Checkpoint {
        progress: Progress {
            fingerprint: "abc".into(),
            resolved: Resolved {
                passes: 1,
                model: "yolov8n".into(),
                batch: 4,
                asked_batch: 4,
                optimizer: "AdamW".into(),
                lr0: 0.001429,
                momentum: 0.9,
                warmup_bias_lr: 0.0,
            },
            epoch: 3,
            batch: iteration as usize,
            epochs: 10,
            step: 77,
            last_step: -1,
            ema_updates: 76,
            loss_sums: [0.1 + 0.2, 1.0 / 3.0, 1e-300],
            best_fitness: Some(0.1),
            stopper: EarlyStop::new(5),
            is_stopping: false,
            metrics: [0.1, 0.2, 0.3, 0.4],
            val_losses: [1.0, 2.0, 3.0],
            rows: vec!["1,2.5,3".into()],
            elapsed_s: 12.75,
            rollbacks: 0,
            loss_scale: None,
            tuning: tuning(),
        },
        values: numbers(40, 0.3),
        buffers: numbers(9, 0.7),
        ema_values: numbers(40, 0.31),
        ema_buffers: numbers(9, 0.71),
        grads: (iteration % 2 == 1).then(|| numbers(40, 1.7)),
        optimizer: OptimizerState {
            steps: 77,
            mu_product: 0.1 + 0.7,
            vectors: vec![("exp_avg".into(), numbers(40, 2.0)), ("exp_avg_sq".into(), numbers(40, 3.0))],
        },
    }
}

/// One measured cut.
fn tuning() -> Tuning {
    let chip = Chip {
        name: "Test".into(),
        uuid: String::new(),
        major: 9,
        minor: 0,
        multiprocessors: 132,
        shared_bytes_max: 232_448,
        l2_bytes: 50 << 20,
        memory_bytes: 80 << 30,
    };
    let params = Conv2dParams { c_in: 16, c_out: 32, kernel: 3, stride: 2, pad: 1 };
    let map = View::new(0, 2, 8, 8, 16, 1);
    let shape = Shape::of_views(&map, &View::new(0, 2, 4, 4, 32, 1), Precision::Bf16);
    let case = Case { pass: Pass::BackwardData, params, shape };
    let mut tuning = Tuning::new(&chip, Precision::Bf16);
    tuning.insert(case, MmaConfig { method: Method::Run, rows: 128, columns: 16, splits: 3 });
    tuning
}

#[test]
fn a_checkpoint_from_before_measured_cuts_means_the_model() {
    let progress = sample(1).progress;
    let mut json = serde_json::to_value(&progress).expect("plain data");
    let back: Progress = serde_json::from_value(json.clone()).expect("the same");
    assert_eq!((&back.tuning, back.tuning.identity()), (&tuning(), tuning().identity()));
    json.as_object_mut().expect("an object").remove("tuning");
    let old: Progress = serde_json::from_value(json).expect("an older one");
    assert_eq!(old, Progress { tuning: Tuning::default(), ..progress });
}

fn borrow(c: &Checkpoint) -> CheckpointRef<'_> {
    CheckpointRef {
        progress: &c.progress,
        values: &c.values,
        buffers: &c.buffers,
        ema_values: &c.ema_values,
        ema_buffers: &c.ema_buffers,
        grads: c.grads.as_deref(),
        optimizer: c.optimizer.by_ref(),
    }
}

#[test]
fn what_is_saved_is_loaded() {
    let folder = tempfile::tempdir().expect("a folder");
    for iteration in [0, 1] {
        let checkpoint = sample(iteration);
        let path = folder.path().join("x.ckpt");
        let saved = save(&path, &borrow(&checkpoint)).expect("saved");
        assert_eq!(load(&path).expect("verified"), checkpoint);
        let bytes = fs::read(&path).expect("read");
        let content = &bytes[..bytes.len() - TRAILER_LEN];
        assert_eq!(saved.sha256, hex(&Sha256::digest(content)));
        // Without the trailer it is a plain safetensors file.
        let tensors = safetensors::SafeTensors::deserialize(content).expect("safetensors");
        assert_eq!(tensors.tensor("ema.values").expect("the average").shape(), [40]);
    }
}

#[test]
fn the_store_keeps_the_newest_and_falls_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::new(folder.path().join("state"), 2);
    assert!(store.newest().expect("no folder yet").newest.is_none());
    for iteration in [5, 80, 1000] {
        store.save(iteration, &borrow(&sample(iteration))).expect("saved");
    }
    let names: Vec<_> = store.list().expect("listed").into_iter().map(|(i, _)| i).collect();
    assert_eq!(names, [1000, 80]);
    let (path, newest) = store.newest().expect("read").newest.expect("one verifies");
    assert_eq!(newest, sample(1000));
    fs::write(&path, b"half a file").expect("damage it");
    let found = store.newest().expect("read");
    assert_eq!(found.newest.expect("the older one").1, sample(80));
    assert!(found.damaged[0].to_string().contains("step-000001000.ckpt is damaged"), "{:?}", found.damaged);
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a");
    fs::write(&path, b"old").expect("written");
    let error = files::write_atomically(&path, |out| {
        out.write_all(b"new")?;
        Err(std::io::Error::other("disk full"))
    })
    .expect_err("the write failed");
    assert!(error.chain().contains("disk full"));
    assert_eq!(fs::read(&path).expect("still there"), b"old");
    assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_flipped_bit_or_cut_is_found(place in 0.0f64..1.0, bit in 0u8..8, cut in any::<bool>()) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.ckpt");
        save(&path, &borrow(&sample(1))).expect("saved");
        let mut bytes = fs::read(&path).expect("read");
        let at = (place * bytes.len() as f64) as usize;
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, &bytes).expect("written");
        let damaged = matches!(load(&path), Err(CheckpointError::Damaged { .. }));
        prop_assert!(damaged);
    }
}

#[test]
fn the_header_says_how_far_the_run_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.ckpt");
    save(&path, &borrow(&sample(1))).expect("saves");
    let open = || fs::File::open(&path).expect("opens");
    assert_eq!(position(&open()), Some(Position { epoch: 3, step: 77 }));
    for other in ["", "x", "another file of more than eight bytes", "\u{5}\0\0\0\0\0\0\0{\"a\"}"] {
        fs::write(&path, other).expect("writes");
        assert_eq!(position(&open()), None, "{other:?}");
    }
}
