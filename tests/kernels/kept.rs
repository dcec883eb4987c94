//! Figures of files that were compiled before, kept in cargo's folder for tests: compiling everything takes minutes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use boxwright::engine::device::cuda::compile::{self, Usage};
use boxwright::engine::device::cuda::sources::{HEADERS, Source};
use sha2::{Digest, Sha256};

/// Headers that a text includes, directly or through others.
fn included(text: &str, found: &mut BTreeSet<&'static str>) {
    let named = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.split('"').next());
    for name in named.collect::<Vec<_>>() {
        if let Some((name, body)) = HEADERS.iter().find(|(header, _)| *header == name)
            && found.insert(name)
        {
            included(body, found);
        }
    }
}

/// File of the figures of `source` for `target`: everything that they depend on is in its name.
pub fn place(source: &Source, target: &str) -> PathBuf {
    let mut headers = BTreeSet::new();
    included(source.text, &mut headers);
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(source.text);
    for (name, body) in HEADERS.iter().filter(|(name, _)| headers.contains(name)) {
        add(name);
        add(body);
    }
    compile::options(target).iter().for_each(|option| add(option));
    add(&format!("{:?}", compile::compiler_version()));
    let digest: String = hash.finalize()[..12].iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernel-figures");
    folder.join(format!("{}-{target}-{digest}", source.stem))
}

/// Figures and block sizes as they were kept.
pub fn read(place: &std::path::Path) -> Option<(Vec<Usage>, BTreeMap<String, u32>)> {
    let text = std::fs::read_to_string(place).ok()?;
    let (mut usage, mut threads) = (Vec::new(), BTreeMap::new());
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [kernel, numbers @ ..] = words.as_slice() else { return None };
        let numbers: Vec<u32> = numbers.iter().map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [block, registers, shared_bytes, spill_bytes, stack_bytes] = numbers[..] else { return None };
        let kernel = (*kernel).to_owned();
        threads.insert(kernel.clone(), block);
        usage.push(Usage { kernel, registers, shared_bytes, spill_bytes, stack_bytes });
    }
    Some((usage, threads))
}

/// Keeps figures; where that fails they are made again next time.
pub fn write(place: &std::path::Path, usage: &[Usage], threads: &BTreeMap<String, u32>) {
    let line = |u: &Usage| {
        let block = threads.get(&u.kernel).copied().unwrap_or(0);
        let (registers, shared, spilled, stack) = (u.registers, u.shared_bytes, u.spill_bytes, u.stack_bytes);
        format!("{} {block} {registers} {shared} {spilled} {stack}\n", u.kernel)
    };
    let text: String = usage.iter().map(line).collect();
    let beside = place.with_extension("part");
    let kept = place.parent().map_or(Ok(()), std::fs::create_dir_all);
    let kept =
        kept.and_then(|()| std::fs::write(&beside, text)).and_then(|()| std::fs::rename(&beside, place));
    if let Err(error) = kept {
        eprintln!("figures cannot be kept in {}: {error}", place.display());
    }
}
