#!/usr/bin/env bash
# Builds what `scripts/gpu-check.sh` runs on a machine with a GPU and no Rust: the program and the test programs of
# the kernels, stripped, in dist/ (or the folder given). They need glibc and a C library as old as this machine's.
#   scripts/gpu-pack.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-dist}
mkdir -p "$out/tests"
rm -f "$out"/tests/*

# Every test program that touches a device: the unit tests, and those named for it.
targets=(--lib)
for file in tests/*cuda*.rs; do
    if [ -e "$file" ]; then targets+=(--test "$(basename "$file" .rs)"); fi
done

cargo build --release
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
cargo test --release --no-run --message-format=json "${targets[@]}" >"$messages"

copy() {
    cp "$1" "$2.part"
    strip "$2.part"
    mv "$2.part" "$2"
}
copy "${CARGO_TARGET_DIR:-target}/release/boxwright" "$out/boxwright"
# One line per artefact; of ours only test programs have the profile `test` and an executable.
grep '"reason":"compiler-artifact"' "$messages" | grep '"test":true' | grep -o '"executable":"[^"]*"' |
    cut -d '"' -f 4 | while read -r program; do
    name=$(basename "$program")
    copy "$program" "$out/tests/${name%-*}"
done
{
    echo "revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet 2>/dev/null || echo ' with changes')"
    echo "built $(date -u +%F) with $(rustc --version)"
} >"$out/BUILD"
du -h "$out"/boxwright "$out"/tests/*
