//! What source files must have and may not hold.

use super::none;
use super::source::{Source, blank, files, item_end, program, read, root, shown};

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
    let folder = root().join("src/engine/ops");
    let mut operations = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("src/engine/ops is readable") {
        let entry = entry.expect("src/engine/ops is readable");
        if entry.file_type().expect("src/engine/ops is readable").is_dir() {
            operations.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    for name in &operations {
        let has = |piece: &str| folder.join(name).join(piece).exists();
        let required = [("mod.rs", has("mod.rs")), ("cpu.rs", has("cpu.rs") || has("cpu/mod.rs"))];
        let tests = ("tests.rs", has("tests.rs") || has("tests/mod.rs"));
        for (piece, present) in required.into_iter().chain([tests]) {
            if !present {
                breaches.push(format!("src/engine/ops/{name}: {piece} is missing"));
            }
        }
        let kernel = root().join(format!("kernels/{name}.cu")).exists();
        if kernel != has("cuda.rs") {
            let (there, missing) = if kernel {
                (format!("kernels/{name}.cu"), format!("src/engine/ops/{name}/cuda.rs"))
            } else {
                (format!("src/engine/ops/{name}/cuda.rs"), format!("kernels/{name}.cu"))
            };
            breaches.push(format!("{there} is there, {missing} is missing"));
        }
    }
    for kernel in files("kernels", &[".cu"]) {
        let stem = kernel.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !operations.contains(&stem) {
            breaches.push(format!("{}: no operation src/engine/ops/{stem}", shown(&kernel)));
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
                // `network/work/` is no absolute path.
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
