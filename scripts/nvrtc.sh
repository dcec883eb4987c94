#!/usr/bin/env bash
# Puts NVIDIA's run-time compiler below the build folder and prints where it lies; does nothing when it is there.
# It compiles kernels on a machine without a GPU, a driver or a CUDA toolkit. About 90 MB from the package index;
# needs python3 with pip. Nothing of it is shipped.
set -euo pipefail
cd "$(dirname "$0")/.."

version=13.0.88
target="${CARGO_TARGET_DIR:-target}"
mkdir -p "$target"
place="$(cd "$target" && pwd)/nvrtc-$version"
folder="$place/nvidia/cu13/lib"
if [ ! -e "$folder/libnvrtc.so.13" ]; then
    part=$(mktemp -d "$place.XXXXXX")
    trap 'rm -rf "$part"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --dest "$part" "nvidia-cuda-nvrtc==$version" >&2
    python3 -m zipfile -e "$part"/nvidia_cuda_nvrtc-*.whl "$part/tree"
    rm -rf "$place"
    mv "$part/tree" "$place"
fi
echo "$folder"
