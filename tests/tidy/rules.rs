//! What source files must have and may not hold.

use super::none;
use super::source::{Source, blank, files, item_end, program, read, root, shown};
use boxwright::engine::device::cuda::sources::{HEADERS, SOURCES};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 120;

/// Never in the program (tests may unwrap).
const BANNED_CALLS: [&str; 4] = ["todo!", "unimplemented!", "dbg!", ".unwrap()"];

#[test]
fn files_are_short_enough_to_read() {
    let long = |path: &std::path::PathBuf| {
        let lines = read(path).lines().count();
        (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines, at most {FILE_LINES_MAX}", shown(path)))
    };
    let all = [files("src", &[".rs"]), files("tests", &[".rs"]), files("kernels", &[".cu", ".cuh"])];
    none(all.iter().flatten().filter_map(long).collect());
}

/// Name, first byte and number of lines of every function with a body.
fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let before = code[..at].chars().next_back().unwrap_or(' ');
        let name: String = code[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if before.is_alphanumeric() || before == '_' || name.is_empty() {
            continue;
        }
        let end = item_end(code, at);
        found.push((name, at, code[at..end].matches('\n').count() + 1));
    }
    found
}

#[test]
fn functions_fit_a_screen_or_two() {
    let long = |source: &Source| -> Vec<String> {
        functions(&source.code)
            .into_iter()
            .filter(|(_, _, lines)| *lines > FUNCTION_LINES_MAX)
            .map(|(name, at, lines)| {
                format!("{}: {name} has {lines} lines, at most {FUNCTION_LINES_MAX}", source.place(at))
            })
            .collect()
    };
    none(program().iter().flat_map(long).collect());
}

#[test]
fn the_program_holds_no_banned_call() {
    let banned = |source: &Source| -> Vec<String> {
        let hits = BANNED_CALLS.iter().flat_map(|call| source.code.match_indices(call));
        hits.map(|(at, call)| format!("{}: {call}", source.place(at))).collect()
    };
    none(program().iter().flat_map(banned).collect());
}

#[test]
fn no_test_is_switched_off() {
    let mut breaches = Vec::new();
    for path in [files("src", &[".rs"]), files("tests", &[".rs"])].concat() {
        for (index, line) in blank(&read(&path)).lines().enumerate() {
            if line.contains("#[ignore") {
                breaches.push(format!("{}:{}: an ignored test", shown(&path), index + 1));
            }
        }
    }
    none(breaches);
}

/// Lines above an `unsafe` in which its argument must stand.
const SAFETY_REACH: usize = 12;

#[test]
fn every_unsafe_block_argues_its_safety() {
    let mut breaches = Vec::new();
    for source in program() {
        let raw: Vec<&str> = source.raw.lines().collect();
        let mut argued_until = 0;
        for (index, line) in source.code.lines().enumerate() {
            let Some((_, rest)) = line.split_once("unsafe ") else { continue };
            if !rest.trim_start().starts_with(['{']) && !rest.trim_start().starts_with("impl") {
                continue;
            }
            // Several blocks in a row may share one argument.
            let from = index.saturating_sub(SAFETY_REACH);
            let argued = raw[from..=index].iter().any(|l| l.contains("SAFETY"));
            if argued || index <= argued_until {
                argued_until = index + 2;
            } else {
                breaches.push(format!("{}:{}: unsafe without `SAFETY:`", shown(&source.path), index + 1));
            }
        }
    }
    none(breaches);
}

#[test]
fn every_operation_has_all_its_pieces() {
    let mut breaches = Vec::new();
    let operations = operations();
    let kernels = kernel_stems();
    for name in &operations {
        let folder = root().join("src/engine/ops").join(name);
        let has = |piece: &str| folder.join(piece).exists();
        let has_module = |piece: &str| has(&format!("{piece}.rs")) || has(&format!("{piece}/mod.rs"));
        for piece in ["cpu", "tests"] {
            if !has_module(piece) {
                breaches.push(format!("src/engine/ops/{name}: {piece}.rs is missing"));
            }
        }
        if !has("mod.rs") {
            breaches.push(format!("src/engine/ops/{name}: mod.rs is missing"));
        }
        let kernel = kernels.iter().find(|stem| operation_of(&operations, stem) == Some(name.as_str()));
        match (kernel, has_module("cuda")) {
            (Some(stem), false) => {
                breaches
                    .push(format!("kernels/{stem}.cu is there, src/engine/ops/{name}/cuda.rs is missing"));
            }
            (None, true) => {
                breaches
                    .push(format!("src/engine/ops/{name}/cuda.rs is there, kernels/{name}.cu is missing"));
            }
            _ => {}
        }
    }
    none(breaches);
}

/// Folders of `src/engine/ops`.
fn operations() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("src/engine/ops")).expect("src/engine/ops is readable");
    let entries = entries.map(|entry| entry.expect("src/engine/ops is readable"));
    let folders = entries.filter(|entry| entry.file_type().expect("src/engine/ops is readable").is_dir());
    folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Names of the kernel files without ending.
fn kernel_stems() -> Vec<String> {
    let stem = |path: &std::path::PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned());
    files("kernels", &[".cu"]).iter().filter_map(stem).collect()
}

/// The operation of `<op>.cu` or `<op>_<variant>.cu`: the longest that fits.
fn operation_of<'a>(operations: &'a [String], stem: &str) -> Option<&'a str> {
    let fits =
        |op: &&String| stem.strip_prefix(op.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('_'));
    operations.iter().filter(fits).max_by_key(|op| op.len()).map(String::as_str)
}

/// Kernel files that belong to no operation of the graph, and the Rust file or folder that drives each.
const DRIVERS: &[(&str, &str)] = &[
    ("augment", "src/data/device_loader"),
    ("cast", "src/engine/device/cuda/executor.rs"),
    ("ceiling", "src/engine/device/cuda/ceiling.rs"),
    ("detection_loss", "src/detect/losses/detection_cuda"),
    ("muon", "src/engine/optim/muon_cuda.rs"),
    ("nms", "src/detect/nms_cuda"),
    ("optim", "src/engine/optim/cuda.rs"),
    ("task_aligned", "src/detect/losses/detection_cuda"),
];

#[test]
fn every_kernel_file_is_driven_by_rust() {
    let mut breaches = Vec::new();
    let operations = operations();
    let stems = kernel_stems();
    for stem in &stems {
        let driver = DRIVERS.iter().find(|(kernel, _)| kernel == stem);
        if driver.is_none() && operation_of(&operations, stem).is_none() {
            breaches.push(format!(
                "kernels/{stem}.cu: neither an operation src/engine/ops/{stem} nor in the list of drivers"
            ));
        }
    }
    for (stem, driver) in DRIVERS {
        let (kernel, host) = (stems.iter().any(|s| s == stem), root().join(driver).exists());
        if kernel != host {
            let missing = if kernel { (*driver).to_owned() } else { format!("kernels/{stem}.cu") };
            breaches.push(format!("kernels/{stem}.cu is driven by {driver}: {missing} is missing"));
        }
    }
    none(breaches);
}

#[test]
fn the_program_carries_every_kernel_file() {
    let mut breaches = Vec::new();
    let named = |carried: Vec<(String, &str)>, ending: &str| -> Vec<String> {
        let mut breaches = Vec::new();
        let there = files("kernels", &[ending]);
        let name = |p: &std::path::PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned());
        let names: Vec<String> = there.iter().filter_map(name).collect();
        for (path, name) in there.iter().zip(&names) {
            match carried.iter().find(|(carried, _)| carried == name) {
                None => breaches.push(format!("{}: not in sources.rs", shown(path))),
                Some((_, text)) if *text != read(path) => {
                    breaches.push(format!("{}: sources.rs carries another file under its name", shown(path)));
                }
                Some(_) => {}
            }
        }
        let gone = carried.iter().filter(|(carried, _)| !names.contains(carried));
        breaches.extend(gone.map(|(carried, _)| format!("sources.rs: no kernels/{carried}")));
        if carried.len() > names.len() {
            breaches.push(format!("sources.rs names a {ending} file twice"));
        }
        breaches
    };
    let sources = SOURCES.iter().map(|s| (format!("{}.cu", s.stem), s.text)).collect();
    breaches.extend(named(sources, ".cu"));
    let headers = HEADERS.iter().map(|(name, text)| ((*name).to_owned(), *text)).collect();
    breaches.extend(named(headers, ".cuh"));
    none(breaches);
}

#[test]
fn kernel_files_say_what_they_do_and_leave_assembly_to_one_header() {
    let mut breaches = Vec::new();
    for path in files("kernels", &[".cu", ".cuh"]) {
        let text = read(&path);
        if !text.starts_with("// ") {
            breaches.push(format!("{}: it does not begin with a comment", shown(&path)));
        }
        let is_kernel = path.extension().is_some_and(|e| e == "cu");
        let header = text.lines().take_while(|line| line.starts_with("//"));
        let header = header.collect::<Vec<_>>().join(" ").to_lowercase();
        // Figures, or that memory is the limit, or the header that says it for several files.
        let says_cost = ["byte", "flop", "bound by memory", ".cuh`"].iter().any(|word| header.contains(word));
        if is_kernel && !says_cost {
            breaches.push(format!("{}: its comment says neither bytes nor FLOPs", shown(&path)));
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("ptx") && !is_kernel {
            continue;
        }
        for (index, line) in blank(&text).lines().enumerate() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if words.any(|word| ["asm", "__asm__", "__asm"].contains(&word)) {
                breaches.push(format!("{}:{}: assembly outside ptx*.cuh", shown(&path), index + 1));
            }
        }
    }
    none(breaches);
}

#[test]
fn the_repository_speaks_of_the_project_alone() {
    // Written in two halves so that this file does not find itself.
    let banned: [(&str, bool); 5] = [
        (concat!("/wo", "rk/"), true),
        (concat!("/tm", "p/wt"), true),
        (concat!("/ro", "ot/"), true),
        (concat!("cla", "ude"), false),
        (concat!("agent ses", "sion"), false),
    ];
    let endings = [".rs", ".md", ".yaml", ".yml", ".toml", ".sh", ".py", ".txt", ".cu", ".cuh", "run"];
    let mut breaches = Vec::new();
    for path in files("", &endings) {
        if path.ends_with("Cargo.lock") {
            continue;
        }
        for (index, line) in read(&path).lines().enumerate() {
            let lower = line.to_lowercase();
            for (word, absolute) in banned {
                // Behind a name, the word is a part of a longer path.
                let begins = |at: usize| {
                    let before = lower[..at].chars().next_back().unwrap_or(' ');
                    !absolute || !(before.is_alphanumeric() || "._-$}~".contains(before))
                };
                if lower.match_indices(word).any(|(at, _)| begins(at)) {
                    breaches.push(format!("{}:{}: `{word}`", shown(&path), index + 1));
                }
            }
        }
    }
    none(breaches);
}
