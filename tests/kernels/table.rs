//! The committed table of registers, shared memory and spills.

use std::path::Path;

use super::{Kernels, TARGETS};

const PAGE: &str = "docs/kernel-resources.md";

fn text(kernels: &Kernels, version: (u32, u32)) -> String {
    let mut page = format!(
        "# Resources of the kernels\n\n\
         What the compiler gives each kernel, for each target: registers of a thread; then, where there is any, `s` \
         and the\nbytes of static shared memory of a block, and `!` and the bytes spilled. A dash: the target has no \
         such kernel.\n\nMade by `tests/kernels` with NVRTC {}.{}; `BOXWRIGHT_BLESS=1` writes it anew.\n\n",
        version.0, version.1
    );
    page.push_str(&format!("| kernel | threads | {} |\n", TARGETS.join(" | ")));
    page.push_str(&format!("|---|--:|{}\n", "--:|".repeat(TARGETS.len())));
    let mut stem = "";
    for ((file, name), kernel) in kernels {
        if *file != stem {
            stem = file;
            page.push_str(&format!("| **{file}.cu** |{}\n", " |".repeat(TARGETS.len() + 1)));
        }
        let cells: Vec<String> = kernel
            .usage
            .iter()
            .map(|usage| match usage {
                None => "–".to_owned(),
                Some(usage) => {
                    let mut cell = usage.registers.to_string();
                    if usage.shared_bytes > 0 {
                        cell.push_str(&format!(" s{}", usage.shared_bytes));
                    }
                    if usage.spill_bytes > 0 {
                        cell.push_str(&format!(" !{}", usage.spill_bytes));
                    }
                    cell
                }
            })
            .collect();
        page.push_str(&format!("| {name} | {} | {} |\n", kernel.threads, cells.join(" | ")));
    }
    page
}

/// The lines that differ, with their numbers.
fn difference(old: &str, new: &str) -> Vec<String> {
    let is_new = |line: &&str| !old.lines().any(|l| l == *line);
    let is_gone = |line: &&str| !new.lines().any(|l| l == *line);
    let gone = old.lines().filter(is_gone).map(|l| format!("- {l}"));
    gone.chain(new.lines().filter(is_new).map(|l| format!("+ {l}"))).collect()
}

/// Compares the table with the file, or writes it. Another version of the compiler gives other figures: then only the
/// names of the kernels are compared.
pub fn check(kernels: &Kernels, version: (u32, u32)) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let new = text(kernels, version);
    if std::env::var_os("BOXWRIGHT_BLESS").is_some_and(|v| v == "1") {
        std::fs::write(&path, new).expect("the page can be written");
        return;
    }
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let is_same_compiler = old.contains(&format!("NVRTC {}.{};", version.0, version.1));
    if is_same_compiler || old.is_empty() {
        let lines = difference(&old, &new);
        assert!(
            old == new,
            "{PAGE} is out of date; run `BOXWRIGHT_BLESS=1 cargo test --release --test kernels`:\n{}",
            lines.join("\n")
        );
        return;
    }
    let missing: Vec<&str> = kernels
        .keys()
        .map(|(_, name)| name.as_str())
        .filter(|n| !old.contains(&format!("| {n} |")))
        .collect();
    assert!(missing.is_empty(), "{PAGE} was made by another compiler and lacks {}", missing.join(", "));
    eprintln!("{PAGE} was made by another compiler; only the names were compared");
}
