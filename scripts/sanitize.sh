#!/usr/bin/env bash
# Runs every kernel, on the emulated device, under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of the
# operations, of loss and optimiser, and a whole training step. A read one number too far, which a test of results may
# not see, ends the test and names the line of the `.cu` file. Needs g++ with its sanitizer libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

runtime=$("${CXX:-g++}" -print-file-name=libasan.so)
if [ ! -e "$runtime" ]; then
    echo "scripts/sanitize.sh: SKIPPED: the compiler has no libasan.so" >&2
    exit 0
fi
folder=$(scripts/emulator.sh --sanitize | tail -n 1)
# The runner starts the test programs alone under the sanitizers, not cargo and the Rust compiler.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 \
BOXWRIGHT_CUDA_DRIVER=$folder BOXWRIGHT_NVRTC=$folder"
cargo test --release --lib cuda "$@"
cargo test --release --lib device "$@"
cargo test --release --test golden_model_cuda "$@"
