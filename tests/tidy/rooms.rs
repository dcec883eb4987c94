//! Arrows between the rooms of `src/` go down only.

use std::path::Path;

use super::none;
use super::source::{Source, program, root};

/// From top to bottom: a room may use itself and those after it.
const ROOMS: [&str; 10] =
    ["cli", "api", "actors", "adapters", "job", "train", "data", "detect", "engine", "yaml"];

fn height(room: &str) -> Option<usize> {
    ROOMS.iter().rev().position(|r| *r == room)
}

/// The room of a file and how many modules deep it lies (`src/train/plots/axes.rs`: train, 3).
fn room_of(path: &Path) -> Option<(String, usize)> {
    let inside = path.strip_prefix(root().join("src")).ok()?;
    let parts: Vec<String> = inside.with_extension("").iter().map(|p| p.to_string_lossy().into()).collect();
    let own = usize::from(parts.last().is_some_and(|p| p == "mod"));
    if parts.len() == 1 && (parts[0] == "lib" || parts[0] == "main") {
        return None;
    }
    Some((parts[0].clone(), parts.len() - own))
}

/// The first names after each path root `prefix`: one for `crate::data::x`, several for `crate::{a, b::c}`.
fn names_after(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back().unwrap_or(' ');
        if before.is_alphanumeric() || before == '_' || before == ':' {
            continue;
        }
        let rest = code[at + prefix.len()..].trim_start();
        let word = |text: &str| -> String {
            text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        };
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut part = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        found.push((at, word(&part)));
                        part.clear();
                        continue;
                    }
                    _ => {}
                }
                part.push(c);
            }
            found.push((at, word(&part)));
        } else {
            found.push((at, word(rest)));
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

fn check(source: &Source) -> Vec<String> {
    let Some((room, depth)) = room_of(&source.path) else { return Vec::new() };
    let Some(own) = height(&room) else {
        return vec![format!("{}: `{room}` is no room of the house", source.place(0))];
    };
    // `super` as often as the file lies deep is the crate's root by another name.
    let climb = "super::".repeat(depth);
    let mut uses = names_after(&source.code, "crate::");
    uses.extend(names_after(&source.code, &climb));
    let mut breaches = Vec::new();
    for (at, name) in uses {
        if let Some(other) = height(&name)
            && other > own
        {
            breaches.push(format!("{}: {room} uses {name}, which lies above it", source.place(at)));
        }
    }
    breaches
}

#[test]
fn imports_go_down_only() {
    none(program().iter().flat_map(check).collect());
}

#[test]
fn a_use_of_a_room_is_found_however_it_is_written() {
    let found = |code: &str| names_after(code, "crate::").into_iter().map(|f| f.1).collect::<Vec<_>>();
    assert_eq!(found("use crate::data::draw;"), ["data"]);
    assert_eq!(found("use crate::{engine::{rng, ops}, cli};"), ["engine", "cli"]);
    assert_eq!(found("let x = crate :: no; crate::yaml::read()"), ["yaml"]);
    assert_eq!(found("othercrate::cli::run()"), Vec::<String>::new());
    let source =
        |path: &str, code: &str| Source { path: root().join(path), raw: code.into(), code: code.into() };
    assert_eq!(check(&source("src/engine/rng.rs", "use crate::detect::boxes;")).len(), 1);
    assert_eq!(check(&source("src/detect/boxes.rs", "use crate::engine::rng;")).len(), 0);
    assert_eq!(check(&source("src/data/draw/mod.rs", "use super::super::train::args;")).len(), 1);
    assert_eq!(check(&source("src/kitchen/mod.rs", "")).len(), 1);
}
