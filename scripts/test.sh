#!/usr/bin/env bash
# Runs every test. Needs cargo and a C and C++ compiler, nothing else; kernels are compiled for chips where
# `scripts/nvrtc.sh` was run before or BOXWRIGHT_NVRTC names a compiler, and Redis, S3 and MLflow are tested with real
# servers where `scripts/services.sh` was run before (else those tests say that they skip). Arguments go to `cargo test`:
#   scripts/test.sh                 all tests
#   scripts/test.sh golden          the tests against recorded reference numbers
set -euo pipefail
cd "$(dirname "$0")/.."

# Training tests use every core themselves: a few tests at a time are enough to keep a machine busy,
# and more would only make the ones with a time limit slow.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
if [ "$cores" -gt 4 ]; then cores=4; fi
export RUST_TEST_THREADS="${RUST_TEST_THREADS:-$cores}"

for folder in "${CARGO_TARGET_DIR:-target}"/nvrtc-*/nvidia/cu13/lib; do
    if [ -z "${BOXWRIGHT_NVRTC:-}" ] && [ -d "$folder" ]; then
        BOXWRIGHT_NVRTC="$(cd "$folder" && pwd)"
        export BOXWRIGHT_NVRTC
    fi
done

places=$(scripts/services.sh --cached) && eval "$places"

exec cargo test --release "$@"
