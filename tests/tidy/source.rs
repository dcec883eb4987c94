//! Reading the source tree: files, and code without its comments, texts and tests.

use std::path::{Path, PathBuf};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Folders that are not source: built, produced by runs, or data.
const SKIPPED: [&str; 7] = ["target", ".git", "runs", "state", "logs", "datasets", "golden"];

/// Every file below `folder` (relative to the repository) whose name ends in one of `endings`, sorted.
pub fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.expect("the repository is readable");
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().expect("the repository is readable");
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                open.push(entry.path());
            } else if kind.is_file() && endings.iter().any(|e| name.ends_with(e)) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// Text of a file.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The path as people write it.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// One source file.
pub struct Source {
    pub path: PathBuf,
    /// As written.
    pub raw: String,
    /// Comments and the insides of texts blanked; line breaks kept, so that places agree with `raw`.
    pub code: String,
}

impl Source {
    /// `src/train/plots/axes.rs:12` for a byte of `code`.
    pub fn place(&self, at: usize) -> String {
        let line = self.code[..at].matches('\n').count() + 1;
        format!("{}:{line}", shown(&self.path))
    }
}

/// All of `src/` without test code: no files of tests, and `#[cfg(test)]` items blanked.
pub fn program() -> Vec<Source> {
    let all: Vec<Source> = files("src", &[".rs"])
        .into_iter()
        .map(|path| {
            let raw = read(&path);
            let code = blank_tests(&blank(&raw));
            Source { path, raw, code }
        })
        .collect();
    let tests: Vec<PathBuf> = all.iter().flat_map(test_modules).collect();
    all.into_iter()
        .filter(|s| !tests.iter().any(|t| s.path.starts_with(t) || s.path == t.with_extension("rs")))
        .collect()
}

/// Paths (without ending) of the modules that a file declares as `#[cfg(test)] mod name;`.
fn test_modules(source: &Source) -> Vec<PathBuf> {
    let stem = source.path.file_stem().unwrap_or_default();
    let parent = source.path.parent().expect("a file has a folder");
    let folder = if stem == "mod" || stem == "lib" || stem == "main" {
        parent.to_path_buf()
    } else {
        parent.join(stem)
    };
    let blanked = blank(&source.raw);
    let mut found = Vec::new();
    for (at, mark) in blanked.match_indices("#[cfg(test)]") {
        let mut rest = blanked[at + mark.len()..].trim_start();
        let from = blanked.len() - rest.len();
        let mut path_attribute = None;
        if rest.starts_with("#[path") {
            // The text inside the quotes is blanked; read it from the file as written.
            path_attribute = source.raw[from..].split('"').nth(1);
            rest = rest.split_once(']').map_or("", |p| p.1).trim_start();
        }
        for visibility in ["pub(crate) ", "pub "] {
            rest = rest.strip_prefix(visibility).unwrap_or(rest);
        }
        let Some((name, _)) = rest.strip_prefix("mod ").and_then(|r| r.split_once(';')) else { continue };
        let name = name.trim();
        if name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            found.push(match path_attribute {
                Some(path) => parent.join(path).with_extension(""),
                None => folder.join(name),
            });
        }
    }
    found
}

/// Blanks comments and the insides of texts and characters.
pub fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let wipe = |out: &mut Vec<u8>, from: usize, to: usize| {
        for byte in &mut out[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    let mut i = 0;
    while i < bytes.len() {
        let rest = &text.as_bytes()[i..];
        let end = if rest.starts_with(b"//") {
            i + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment_end(bytes, i)
        } else if let Some(end) = text_end(bytes, i) {
            // The quotes stay, so that `.expect("...")` is still a call with one argument.
            wipe(&mut out, i + 1, end - 1);
            i = end;
            continue;
        } else {
            i += 1;
            continue;
        };
        wipe(&mut out, i, end);
        i = end;
    }
    String::from_utf8(out).expect("whole characters are blanked")
}

fn block_comment_end(bytes: &[u8], from: usize) -> usize {
    let (mut depth, mut i) = (0, from);
    while i < bytes.len() {
        if bytes[i..].starts_with(b"/*") {
            depth += 1;
            i += 2;
        } else if bytes[i..].starts_with(b"*/") {
            depth -= 1;
            i += 2;
            if depth == 0 {
                return i;
            }
        } else {
            i += 1;
        }
    }
    bytes.len()
}

/// Past the end of the text or character that begins at `i`; `None` where none begins.
fn text_end(bytes: &[u8], i: usize) -> Option<usize> {
    let before = i.checked_sub(1).map_or(b' ', |b| bytes[b]);
    let word = before.is_ascii_alphanumeric() || before == b'_';
    match bytes[i] {
        b'"' => {
            let mut j = i + 1;
            while j < bytes.len() && bytes[j] != b'"' {
                j += if bytes[j] == b'\\' { 2 } else { 1 };
            }
            Some((j + 1).min(bytes.len()))
        }
        b'r' if !word || before == b'b' => {
            let hashes = bytes[i + 1..].iter().take_while(|b| **b == b'#').count();
            if bytes.get(i + 1 + hashes) != Some(&b'"') {
                return None;
            }
            let mut closing = vec![b'"'];
            closing.extend(std::iter::repeat_n(b'#', hashes));
            let from = i + 2 + hashes;
            let length = bytes[from..].windows(closing.len()).position(|w| w == closing)?;
            Some(from + length + closing.len())
        }
        b'\'' => {
            // A character, not a lifetime: 'x' or '\..' closes; a lifetime does not.
            if bytes.get(i + 1) == Some(&b'\\') {
                let length = bytes[i + 3..].iter().position(|b| *b == b'\'')?;
                return Some(i + 3 + length + 1);
            }
            let first = std::str::from_utf8(&bytes[i + 1..(i + 5).min(bytes.len())]);
            let text = match &first {
                Ok(text) => *text,
                Err(e) => std::str::from_utf8(&bytes[i + 1..i + 1 + e.valid_up_to()]).ok()?,
            };
            let width = text.chars().next()?.len_utf8();
            (bytes.get(i + 1 + width) == Some(&b'\'')).then_some(i + 2 + width)
        }
        _ => None,
    }
}

/// Blanks every item under `#[cfg(test)]` in code that has no comments and texts.
fn blank_tests(code: &str) -> String {
    let mut out = code.to_string();
    let mut from = 0;
    while let Some(at) = out[from..].find("#[cfg(test)]").map(|a| a + from) {
        let end = item_end(&out, at);
        let blanked: String = out[at..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        // Characters that take several bytes would shift places; code outside texts has none.
        assert_eq!(blanked.len(), end - at, "code outside texts and comments is ASCII");
        out.replace_range(at..end, &blanked);
        from = end;
    }
    out
}

/// Past the end of the item that begins at `at`: its closing brace, or its semicolon.
pub fn item_end(code: &str, at: usize) -> usize {
    let mut depth = 0usize;
    for (i, c) in code[at..].char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && c == '}' {
                    return at + i + 1;
                }
            }
            ';' if depth == 0 => return at + i + 1,
            _ => {}
        }
    }
    code.len()
}

#[test]
fn comments_texts_and_tests_are_blanked_and_code_is_kept() {
    let text = "let a = \"todo!()\"; // todo!()\n/* x /* y */ */ let c = '\"'; f::<'a>(r#\"\"q\"#);\n";
    let code = blank(text);
    assert!(!code.contains("todo") && !code.contains('q') && code.contains("f::<'a>(r"));
    assert_eq!(code.len(), text.len());
    assert_eq!(code.matches('\n').count(), 2);
    let tested = blank_tests("fn a() {}\n#[cfg(test)]\nmod t { fn b() { c[0]; } }\nfn d() {}\n");
    assert!(tested.contains("fn a") && tested.contains("fn d") && !tested.contains("fn b"));
}
