#!/usr/bin/env bash
# The whole path once, in a folder of its own: make a data set, drop a job, let the service train it until
# the queue is empty, look at what it left, find objects with the result. Takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --quiet
target="${CARGO_TARGET_DIR:-target}"
boxwright="$(cd "$target" && pwd)/release/boxwright"
place=$(mktemp -d "${TMPDIR:-/tmp}/boxwright-smoke.XXXXXX")
trap 'rm -rf "$place"' EXIT
export XDG_CACHE_HOME="$place/cache"
cd "$place"

fail() {
    echo "smoke: $*" >&2
    find . -type f | head -n 60 >&2
    for log in logs/*.log logs/jobs/*.log; do
        if [ -f "$log" ]; then tail -n 40 "$log" >&2; fi
    done
    exit 1
}

# GNU coreutils has timeout; the limit is many times what the step takes.
limited() { timeout 600 "$@"; }

limited "$boxwright" dataset synth datasets/tiny --images 24 --imgsz 96 || fail "no data set was made"
limited "$boxwright" dataset check datasets/tiny || fail "the data set that was made is not sound"

mkdir -p configs
cat >configs/smoke.yaml <<'YAML'
model: yolov8n
type: yolo
task_id: smoke
train:
  data: datasets/tiny
  epochs: 2
  imgsz: 96
  batch: 8
  workers: 1
YAML
limited "$boxwright" run configs --once || fail "the service ended with code $?"

[ -f configs/smoke.yaml.accepted.json ] || fail "no word about the job beside its file"
limited "$boxwright" status smoke --json | grep -q '"completed"' || fail "the job is not completed"
results=$(find runs -name results.csv | head -n 1)
[ -n "$results" ] || fail "no results.csv"
[ "$(wc -l <"$results")" -eq 3 ] || fail "results.csv has not one row per epoch"
run=$(dirname "$results")
for file in args.yaml events.jsonl results.png labels.png BoxPR_curve.png confusion_matrix.png \
    train_batch0.png val_batch0_pred.png weights/best.safetensors weights/last.safetensors; do
    [ -s "$run/$file" ] || fail "no $file in the run folder"
done

limited "$boxwright" val "$run/weights/best.safetensors" --data datasets/tiny --imgsz 96 >/dev/null ||
    fail "the weights cannot be validated"
lines=$(limited "$boxwright" predict "$run/weights/best.safetensors" datasets/tiny/images/val \
    --out found --conf 0.001 --json | wc -l)
[ "$lines" -gt 0 ] || fail "no image was predicted"
[ -s found/predictions.json ] || fail "no predictions.json"
echo "smoke: the job completed in two epochs, $lines images were predicted"
