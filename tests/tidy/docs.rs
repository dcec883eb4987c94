//! The documentation agrees with the program and its links lead somewhere.

use std::collections::BTreeSet;

use boxwright::train::args::keys_markdown;

use super::none;
use super::source::{files, read, root, shown};

/// README.md and all of docs/.
fn pages() -> Vec<std::path::PathBuf> {
    let mut pages = files("docs", &[".md"]);
    pages.push(root().join("README.md"));
    pages
}

/// Addresses of the links and pictures in a line, `](address)` and `src="address"`.
fn targets(line: &str) -> Vec<&str> {
    let markdown = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let html = line.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next());
    markdown.chain(html).collect()
}

/// The anchors that the headings of a page give, in the manner of the usual renderers.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|l| l.starts_with('#'));
    let slug = |heading: &str| -> String {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = words.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

#[test]
fn relative_links_lead_to_files_and_headings() {
    let mut breaches = Vec::new();
    for page in pages() {
        let folder = page.parent().expect("a page lies in a folder");
        let text = read(&page);
        for (index, line) in text.lines().enumerate() {
            for target in targets(line) {
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
                let file = if path.is_empty() { page.clone() } else { folder.join(path) };
                let place = format!("{}:{}", shown(&page), index + 1);
                if !file.exists() {
                    breaches.push(format!("{place}: no file {path}"));
                } else if !anchor.is_empty() && !anchors(&read(&file)).contains(anchor) {
                    breaches.push(format!("{place}: no heading for #{anchor}"));
                }
            }
        }
    }
    none(breaches);
}

const BEGIN: &str = "<!-- keys:begin -->";
const END: &str = "<!-- keys:end -->";

/// The service's keys from its commented file, which another test keeps equal to the program's defaults.
fn service_keys() -> String {
    let text = read(&root().join("configs/service/boxwright.yaml"));
    let mut table = String::from("| key | default | what it does |\n|---|---|---|\n");
    let (mut comment, mut block) = (Vec::new(), String::new());
    for line in text.lines() {
        let inside = line.starts_with(' ');
        let line = line.trim();
        if let Some(words) = line.strip_prefix('#') {
            comment.push(words.trim());
            continue;
        }
        let Some((key, value)) = line.split_once(':') else {
            comment.clear();
            continue;
        };
        let value = value.trim();
        if !inside {
            block.clear();
        }
        if value.is_empty() {
            block = format!("{key}.");
            // What is said of a block holds for its keys when these say nothing themselves.
            continue;
        }
        let words = comment.join(" ");
        let words = if words.is_empty() { "as above".to_string() } else { words };
        table.push_str(&format!("| `{block}{key}` | `{value}` | {words} |\n"));
        comment.clear();
    }
    table
}

/// What stands between the marks of README.md.
fn generated() -> String {
    format!(
        "\n### Keys of a job, under `train`\n\n<details><summary>all training keys</summary>\n\n{}\n</details>\n\n\
         ### Keys of the service\n\n<details><summary>all service keys</summary>\n\n{}\n</details>\n\n",
        keys_markdown(),
        service_keys()
    )
}

#[test]
fn the_key_tables_in_readme_are_those_of_the_program() {
    let path = root().join("README.md");
    let text = read(&path);
    let (Some(from), Some(to)) = (text.find(BEGIN), text.find(END)) else {
        panic!("README.md has the marks {BEGIN} and {END}");
    };
    let from = from + BEGIN.len();
    let wanted = generated();
    if text[from..to] == wanted {
        return;
    }
    if std::env::var_os("BOXWRIGHT_BLESS").is_some() {
        let written = format!("{}{wanted}{}", &text[..from], &text[to..]);
        std::fs::write(&path, written).expect("README.md can be written");
        return;
    }
    panic!("the key tables of README.md are out of date; write them with BOXWRIGHT_BLESS=1");
}

#[test]
fn links_and_headings_are_found() {
    assert_eq!(targets("a [b](c.md#d) and ![e](f.png) <img src=\"g.png\">"), ["c.md#d", "f.png", "g.png"]);
    assert!(anchors("# A b-c: `d`\ntext\n## Two").contains("a-b-c-d"));
}
