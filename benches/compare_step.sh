#!/usr/bin/env bash
# Times one training step of Boxwright and of the reference in turn, on the same cores, and prints the ratio.
#
#   benches/compare_step.sh [PYTHON]        PYTHON: an interpreter with torch, torchvision and ultralytics
#
# Run it on a machine with nothing else to do: the reference slows down more than we do beside a busy
# neighbour. Each round runs ours, the reference, and the reference with channels-last; the table shows
# medians over the rounds and the spread.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
rounds=${ROUNDS:-5}
sizes=${SIZES:-"320 640"}
model=${MODEL:-yolov8n}
batch=${BATCH:-8}
steps=${STEPS:-10}
threads=${THREADS:-$(nproc)}
cargo build --release --quiet
boxwright=${CARGO_TARGET_DIR:-target}/release/boxwright
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for size in $sizes; do
  for round in $(seq "$rounds"); do
    "$boxwright" bench step --model "$model" --imgsz "$size" --batch "$batch" --steps "$steps" --threads "$threads" --json >>"$out/ours-$size"
    for form in "" "--channels-last"; do
      # shellcheck disable=SC2086 # the empty form is no argument
      "$python" benches/peer_step.py --model "$model.yaml" --imgsz "$size" --batch "$batch" --steps "$steps" --threads "$threads" \
        --device cpu --amp off $form 2>/dev/null >>"$out/peer$form-$size"
    done
    echo "imgsz $size: round $round of $rounds done" >&2
  done
done
"$python" - "$out" "$sizes" <<'PY'
import json, statistics, sys
folder, sizes = sys.argv[1], sys.argv[2].split()
print("| imgsz | images/s, ours (min..max) | reference | reference, channels-last | ratio to its best | peak MiB, ours / reference |")
print("|---|---|---|---|---|---|")
for size in sizes:
    read = lambda name: [json.loads(l) for l in open(f"{folder}/{name}-{size}")]
    ours, plain, last = read("ours"), read("peer"), read("peer--channels-last")
    speed = lambda rows: [r["img_s"] for r in rows]
    show = lambda rows: f"{statistics.median(speed(rows)):.1f} ({min(speed(rows)):.1f}..{max(speed(rows)):.1f})"
    best = max(plain, last, key=lambda rows: statistics.median(speed(rows)))
    ratio = [a / b for a, b in zip(speed(ours), speed(best))]
    peak = f'{statistics.median(r["peak_mib"] for r in ours):.0f} / {statistics.median(r["peak_mib"] for r in best):.0f}'
    print(f"| {size} | {show(ours)} | {show(plain)} | {show(last)} | {statistics.median(ratio):.2f} ({min(ratio):.2f}..{max(ratio):.2f}) | {peak} |")
PY
