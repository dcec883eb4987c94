#!/usr/bin/env bash
# Builds the stand-ins for the CUDA driver and its compiler, with every kernel compiled as C++ for the emulator
# (see tests/emulator/README.md). Needs g++. The last line printed is the folder that holds libcuda.so.1 and
# libnvrtc.so.13: $BOXWRIGHT_EMULATOR_DIR, or `emulator` in cargo's target folder, and the same name with `-faults` or
# `-sanitize` behind it.
#   scripts/emulator.sh                the kernels of the program
#   scripts/emulator.sh --faults       the small kernels of the emulator's own tests
#   scripts/emulator.sh --sanitize     either with AddressSanitizer and UndefinedBehaviorSanitizer;
#                                      so does BOXWRIGHT_EMULATOR_SANITIZE=1
# What has not changed is not compiled again. Several calls at once build one after another.
set -euo pipefail

# A test program that runs under a sanitizer calls this script too.
unset LD_PRELOAD

sources=kernels
sanitize=${BOXWRIGHT_EMULATOR_SANITIZE:-}
for option in "$@"; do
    case $option in
        --faults) sources=tests/emulator/faults ;;
        --sanitize) sanitize=yes ;;
        *) echo "scripts/emulator.sh: unknown option $option" >&2; exit 2 ;;
    esac
done

target=${CARGO_TARGET_DIR:-}
if [ -n "$target" ]; then target=$(mkdir -p "$target" && cd "$target" && pwd); fi
given=${BOXWRIGHT_EMULATOR_DIR:-}
if [ -n "$given" ]; then given=$(mkdir -p "$given" && cd "$given" && pwd); fi
cd "$(dirname "$0")/.."
folder=${given:-${target:-$PWD/target}/emulator}
if [ "$sources" != kernels ]; then folder=$folder-faults; fi
if [ -n "$sanitize" ]; then folder=$folder-sanitize; fi

compiler=${CXX:-g++}
if ! command -v "$compiler" >/dev/null; then
    echo "scripts/emulator.sh: $compiler is needed" >&2
    exit 3
fi
flags=(-std=c++17 -O2 -fPIC -pthread -fno-strict-aliasing -ffp-contract=off -fvisibility=hidden)
# Cheap enough for every build: an address that is not aligned to its type, an index outside of a fixed array.
kernel_checks=(-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error)
if [ -n "$sanitize" ]; then
    kernel_checks=()
    flags+=(-g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined)
fi
kernel_flags=(-g1 "${kernel_checks[@]}" -x c++ -w -DBOXWRIGHT_EMULATOR -I tests/emulator -I kernels)
own_flags=(-O3 -Wall -Wextra -Wno-unknown-pragmas -I tests/emulator -I kernels)

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9

# Texts that change with anything that all kernels, or all of the emulator's own files, depend on.
common() {
    { "$compiler" --version; echo "${flags[@]}"; cat "$@"; } | sha256sum | cut -c 1-64
}
kernel_common=$(common tests/emulator/emula*.h kernels/*.cuh)
own_common=$(common tests/emulator/*.h)

# compile COMMON SOURCE OBJECT FLAG...: unless the object was made from the same text. Where some header has changed, the
# text with its headers decides (with line numbers, which the object holds).
compile() {
    local common=$1 source=$2 object=$3 stamp text
    shift 3
    stamp=$({ echo "$common $source $*"; cat "$source"; } | sha256sum | cut -c 1-64)
    if [ -f "$object" ] && [ "$(cat "$object.stamp" 2>/dev/null)" = "$stamp" ]; then return 0; fi
    text=$({ "$compiler" --version; echo "${flags[@]} $*"; "$compiler" "${flags[@]}" "$@" -E "$source" 2>&1; } 9>&- |
        sha256sum | cut -c 1-64)
    if [ -f "$object" ] && [ -f "$object.stamp" ] && [ "$(cat "$object.text" 2>/dev/null)" = "$text" ]; then
        echo "$stamp" >"$object.stamp"
        return 0
    fi
    rm -f "$object.stamp"
    if ! "$compiler" "${flags[@]}" "$@" -c "$source" -o "$object" 2>"$object.log" 9>&-; then
        cat "$object.log" >&2
        return 1
    fi
    rm -f "$object.log"
    echo "$text" >"$object.text"
    echo "$stamp" >"$object.stamp"
}

objects=()
running=0
failed=0
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
start() {
    if [ "$running" -ge "$cores" ]; then
        wait -n || failed=1
        running=$((running - 1))
    fi
    compile "$@" &
    running=$((running + 1))
}
shopt -s nullglob
for source in "$sources"/*.cu; do
    stem=$(basename "$source" .cu)
    objects+=("$folder/kernel_$stem.o")
    start "$kernel_common" "$source" "$folder/kernel_$stem.o" "${kernel_flags[@]}" "-DBOXWRIGHT_STEM=\"$stem\""
done
for stem in emulator launches emulated_ptx emulated_ptx_sm90 driver driver_{memory,streams,graphs,tensor_maps}; do
    source=tests/emulator/$stem.cpp
    objects+=("$folder/$stem.o")
    start "$own_common" "$source" "$folder/$stem.o" "${own_flags[@]}"
done
start "$own_common" tests/emulator/nvrtc.cpp "$folder/nvrtc.o" "${own_flags[@]}"
while [ "$running" -gt 0 ]; do
    wait -n || failed=1
    running=$((running - 1))
done
if [ "$failed" != 0 ]; then
    echo "scripts/emulator.sh: the emulator was not built" >&2
    exit 1
fi

# link LIBRARY NAME OBJECT...: moved into place at once, since a running test may use the one before.
link() {
    local library=$1 soname=$2 stamp
    shift 2
    stamp=$({ echo "$soname $*"; for object in "$@"; do cat "$object.stamp"; done; } | sha256sum | cut -c 1-64)
    if [ -f "$library" ] && [ "$(cat "$library.stamp" 2>/dev/null)" = "$stamp" ]; then return 0; fi
    rm -f "$library.stamp"
    "$compiler" "${flags[@]}" -shared -Wl,-soname,"$soname" -o "$library.new" "$@" -ldl 9>&-
    mv "$library.new" "$library"
    echo "$stamp" >"$library.stamp"
}
link "$folder/libcuda.so.1" libcuda.so "${objects[@]}"
link "$folder/libnvrtc.so.13" libnvrtc.so.13 "$folder/nvrtc.o"
echo "$folder"
