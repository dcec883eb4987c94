//! What is taken of what was timed, and how it is kept on disk; no kernel runs here.

use std::fs;

use super::*;
use crate::engine::device::cuda::Chip;

fn chip(name: &str) -> Chip {
    Chip {
        name: name.into(),
        uuid: String::new(),
        major: 9,
        minor: 0,
        multiprocessors: 132,
        shared_bytes_max: 232_448,
        l2_bytes: 50 << 20,
        memory_bytes: 80 << 30,
    }
}

fn subject(c: usize, chip: &Chip) -> Subject {
    let p = Conv2dParams { c_in: c, c_out: c, kernel: 3, stride: 1, pad: 1 };
    let map = View::new(0, 4, 20, 20, c, 1);
    Subject::new(Pass::Forward, p, (map, map), Output::Stats, Precision::Bf16, chip)
        .expect("for tensor cores")
}

/// A clock that says what it is told, the first candidate first, and counts.
struct Said(Vec<f64>, usize);

impl Clock for Said {
    fn time(&mut self, _: &Subject, configs: &[MmaConfig]) -> Result<Vec<f64>, DeviceError> {
        self.1 += 1;
        Ok((0..configs.len()).map(|i| self.0.get(i).copied().unwrap_or(9.0)).collect())
    }
}

fn measured(subjects: &[Subject], known: &Tuning, limits: &Limits, times: &[f64]) -> (Tuning, usize) {
    let mut clock = Said(times.to_vec(), 0);
    let tuning = measure(subjects, known, &chip("Test"), Precision::Bf16, limits, &mut clock);
    (tuning.expect("no fault"), clock.1)
}

#[test]
fn only_what_is_clearly_faster_replaces_the_model() {
    let chip = chip("Test");
    let subject = subject(64, &chip);
    let Case { pass, params, shape } = subject.case;
    let all = MmaConfig::candidates(pass, &params, &shape, &chip, false);
    let taken = |times: &[f64]| {
        let (tuning, _) = measured(&[subject], &Tuning::default(), &Limits::default(), times);
        tuning.choose(pass, &params, &shape, &chip)
    };
    assert_eq!(taken(&[1.0, 2.0, 0.96]), all[2]);
    assert_eq!(taken(&[1.0, 2.0, 0.98]), all[0], "within three percent");
    assert_eq!(taken(&[1.0, 0.9, 0.9]), all[1], "the model's order decides between equals");
    assert_eq!(taken(&[0.0, 0.0, 0.0]), all[0], "a clock that shows nothing");
    assert_eq!(taken(&[1.0, f64::NAN, 0.5]), all[2]);
    assert_eq!(taken(&[f64::NAN, 0.1, 0.5]), all[0]);
}

#[test]
fn cases_are_measured_once_and_within_the_limits() {
    let chip = chip("Test");
    let both = [subject(64, &chip), subject(128, &chip), subject(64, &chip)];
    let (all, asked) = measured(&both, &Tuning::default(), &Limits::default(), &[2.0, 1.0]);
    assert_eq!((all.len(), asked), (2, 2));
    assert_eq!(measured(&both, &all, &Limits::default(), &[1.0]).1, 0, "all are known");
    let no_time = Limits { seconds: -1.0, ..Limits::default() };
    assert_eq!(measured(&both, &Tuning::default(), &no_time, &[1.0]).1, 0);
    let no_memory = Limits { bytes: 1000, ..Limits::default() };
    assert!(measured(&both, &Tuning::default(), &no_memory, &[1.0]).0.is_empty());
}

#[test]
fn an_entry_that_the_chip_does_not_offer_is_not_used() {
    let chip = chip("Test");
    let Case { pass, params, shape } = subject(64, &chip).case;
    let wild = MmaConfig { method: Method::Patch { tile_h: 0, tile_w: 0 }, rows: 7, columns: 9, splits: 0 };
    let mut tuning = Tuning::new(&chip, Precision::Bf16);
    tuning.insert(Case { pass, params, shape }, wild);
    let model = MmaConfig::choose(pass, &params, &shape, &chip);
    assert_eq!(tuning.choose(pass, &params, &shape, &chip), model);
}

#[test]
fn a_file_gives_back_what_was_merged_into_it() {
    let (chip, folder) = (chip("Test"), tempfile::tempdir().expect("a folder"));
    let merge = |t: &Tuning| tuning_file::merge(folder.path(), &chip, Precision::Bf16, t).expect("written");
    let read = || tuning_file::read(folder.path(), &chip, Precision::Bf16);
    assert!(read().is_empty());
    let limits = Limits::default();
    let (first, _) = measured(&[subject(64, &chip)], &Tuning::default(), &limits, &[2.0, 1.0]);
    let (second, _) = measured(&[subject(128, &chip)], &Tuning::default(), &limits, &[2.0, 1.0]);
    merge(&first);
    assert_eq!(read(), first);
    let path = merge(&second);
    let mut both = first.clone();
    both.extend(&second);
    assert_eq!((read(), read().identity()), (both.clone(), both.identity()));
    // Later measurements replace earlier ones.
    let (again, _) = measured(&[subject(64, &chip)], &Tuning::default(), &limits, &[1.0]);
    merge(&again);
    let case = subject(64, &chip).case;
    assert_eq!((read().len(), read().get(&case)), (2, again.get(&case)));
    assert_ne!(again.get(&case), first.get(&case));
    let names = fs::read_dir(folder.path()).expect("a folder").flatten().map(|e| e.file_name());
    assert!(names.into_iter().all(|n| !n.to_string_lossy().ends_with(".part")));
    assert!(path.starts_with(folder.path()));
}

#[test]
fn damaged_and_foreign_files_count_as_none_and_are_replaced() {
    let (ours, folder) = (chip("Test"), tempfile::tempdir().expect("a folder"));
    let read = |chip: &Chip, precision| tuning_file::read(folder.path(), chip, precision);
    let (tuning, _) = measured(&[subject(64, &ours)], &Tuning::default(), &Limits::default(), &[2.0, 1.0]);
    let path = tuning_file::merge(folder.path(), &ours, Precision::Bf16, &tuning).expect("written");
    let whole = fs::read_to_string(&path).expect("a file");
    // Another chip, fewer multiprocessors of it, or another precision look for other files, and refuse this one.
    let others = [chip("Other"), Chip { multiprocessors: 66, ..ours.clone() }];
    for (chip, precision) in
        [(&others[0], Precision::Bf16), (&others[1], Precision::Bf16), (&ours, Precision::F16)]
    {
        assert!(read(chip, precision).is_empty());
        fs::copy(&path, tuning_file::path(folder.path(), chip, precision)).expect("a copy");
        assert!(read(chip, precision).is_empty());
    }
    let splits = whole.find("\"splits\":").expect("an entry") + 9;
    let flipped = format!("{}7{}", &whole[..splits], &whole[splits..]);
    let other_kernels = whole.replacen("\"kernels\":\"", "\"kernels\":\"0", 1);
    for damaged in
        ["", "{}", &whole[..whole.len() / 2], flipped.as_str(), other_kernels.as_str(), "\u{0}\u{1}"]
    {
        fs::write(&path, damaged).expect("written");
        assert!(read(&ours, Precision::Bf16).is_empty(), "{damaged:?}");
        tuning_file::merge(folder.path(), &ours, Precision::Bf16, &tuning).expect("written");
        assert_eq!(read(&ours, Precision::Bf16), tuning);
    }
}
