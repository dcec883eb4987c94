//! The documentation agrees with the program and its links lead somewhere.

use super::none;
use super::source::{files, read, root, shown};

const BEGIN: &str = "<!-- keys:begin -->";
const END: &str = "<!-- keys:end -->";

#[test]
fn relative_links_lead_to_files() {
    let mut breaches = Vec::new();
    let mut pages = files("docs", &[".md"]);
    pages.push(root().join("README.md"));
    for page in pages {
        let folder = page.parent().expect("a page lies in a folder");
        for (index, line) in read(&page).lines().enumerate() {
            for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let path = target.split('#').next().unwrap_or_default();
                let elsewhere = path.is_empty() || path.contains("://") || path.starts_with("mailto:");
                if !elsewhere && !folder.join(path).exists() {
                    breaches.push(format!("{}:{}: no file {path}", shown(&page), index + 1));
                }
            }
        }
    }
    none(breaches);
}
