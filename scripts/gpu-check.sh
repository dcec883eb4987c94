#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and one table. Needs no Rust: runs the programs that
# `scripts/gpu-pack.sh` collected ($BOXWRIGHT_BIN, or dist/), from the root of the repository.
#   scripts/gpu-check.sh             the whole check, 10 to 20 minutes
#   scripts/gpu-check.sh --quick     small sizes, also for the emulated device (its times mean nothing)
#   scripts/gpu-check.sh STEP...     only these: tests sanitizer start train resume profile speed
# The table goes to standard output and, where $OUT is set, to $OUT/gpu-check.md beside the logs of the steps.
# A step that fails or takes too long does not end the others; the exit code is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."

root=$PWD
bin=$(cd "${BOXWRIGHT_BIN:-dist}" 2>/dev/null && pwd) || { echo "no programs in ${BOXWRIGHT_BIN:-dist}: scripts/gpu-pack.sh makes them" >&2; exit 2; }
boxwright=$bin/boxwright
quick=
wanted=()
for word in "$@"; do
    case $word in
        --quick) quick=yes ;;
        tests | sanitizer | start | train | resume | profile | speed) wanted+=("$word") ;;
        *) echo "gpu-check: unknown word $word" >&2; exit 2 ;;
    esac
done
if [ "${#wanted[@]}" -eq 0 ]; then wanted=(tests sanitizer start train resume profile speed); fi

work=$(mktemp -d "${TMPDIR:-/tmp}/boxwright-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
logs=${OUT:-$work}/logs
mkdir -p "$logs"
export XDG_CACHE_HOME=$work/cache BOXWRIGHT_GOLDEN=$root/tests/golden BOXWRIGHT_TEST_GPU=1
rows=()
failed=0

row() { rows+=("| $1 | $2 | ${3//|/,} |"); printf '%-7s %-34s %s\n' "$2" "$1" "$3"; }
passed() { row "$1" ok "$2"; }
skipped() { row "$1" skipped "$2"; }
# failure NAME LOG CODE: with the last words of the log.
failure() {
    local why
    why=$(grep -v '^[[:space:]]*$' "$2" 2>/dev/null | grep -iE 'error|panicked|FAILED|fault' | tail -n 1 | cut -c 1-200)
    if [ "$3" = 124 ] || [ "$3" = 137 ]; then why="it took longer than its limit. $why"; fi
    row "$1" FAILED "${why:-exit code $3}"
    failed=$((failed + 1))
}
# run LOG SECONDS COMMAND...: standard output and error go to the log.
run() {
    local log=$1 limit=$2
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
}
# seconds COMMAND...: of the wall clock, on standard output; the command's code is kept.
seconds() {
    local begin end code
    begin=$(date +%s%N)
    "$@"
    code=$?
    end=$(date +%s%N)
    awk -v ns=$((end - begin)) 'BEGIN { printf "%.2f", ns / 1e9 }'
    return "$code"
}
# field NAME FILE: a number of the last line of JSON that has it.
field() { grep -o "\"$1\": *[-0-9.e+]*" "$2" | tail -n 1 | sed 's/.*: *//'; }
has() { local w; for w in "${wanted[@]}"; do if [ "$w" = "$1" ]; then return 0; fi; done; return 1; }

# ---- the device -------------------------------------------------------------------------------------------------
(cd "$work" && "$boxwright" doctor >"$logs/doctor.log" 2>&1)
"$boxwright" doctor --json >"$logs/doctor.json" 2>/dev/null
says() { sed -n "s/^[a-z]* *$1  *//p" "$logs/doctor.log" | head -n 1; }
if ! grep -q '^ok *graphics' "$logs/doctor.log"; then
    row "device" FAILED "$(says graphics)"
    printf '%s\n' "gpu-check: there is no GPU to check" >&2
    exit 1
fi
passed "device" "$(says gpu)"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
passed "driver" "${driver:+$driver; }$(says graphics)"
passed "kernel compiler" "$(says 'kernel compiler')"
emulated=
if grep -q 'CPU emulation' "$logs/doctor.log"; then
    emulated=yes
    if [ -z "$quick" ]; then echo "gpu-check: the emulated device is for --quick only" >&2; exit 2; fi
fi

# ---- sizes ------------------------------------------------------------------------------------------------------
if [ -n "$quick" ]; then
    step_models="yolov8n" imgsz=64 batch=2 steps=2 warmup=1 epochs=1 batches="2"
    step_limit=300 train_limit=600
else
    step_models="yolov8n yolov8s yolov8m yolov8l yolov8x" imgsz=640 batch=16 steps=30 warmup=10 epochs=${EPOCHS:-40}
    batches="16 64"
    step_limit=180 train_limit=900
fi
# A copy of BCCD, so that nothing is written beside the original; without one, drawn images.
dataset=
for place in "${BCCD:-}" datasets/bccd shared/datasets/bccd ../shared/datasets/bccd; do
    if [ -z "$quick" ] && [ -n "$place" ] && [ -d "$place/images" ]; then dataset=$place; break; fi
done
tiny=$work/tiny
tiny_size=$([ -n "$quick" ] && echo 64 || echo 160)
"$boxwright" dataset synth "$tiny" --images 12 --val-images 4 --imgsz "$tiny_size" >"$logs/synth.log" 2>&1
if [ -n "$dataset" ]; then
    cp -r "$dataset" "$work/bccd"
    data=$work/bccd/bccd.yaml
    name=BCCD
else
    data=$tiny
    name="drawn images"
fi

# ---- kernels on the chip ----------------------------------------------------------------------------------------
check_tests() {
    local program title log code count
    for program in "$bin"/tests/*; do
        title="tests: $(basename "$program")"
        log=$logs/tests-$(basename "$program").log
        # The unit tests hold all of the program; those of a device have the word in their names.
        local filter=()
        if [ "$(basename "$program")" = boxwright ]; then filter=(cuda); fi
        run "$log" 900 "$program" "${filter[@]}" --test-threads=4
        code=$?
        count=$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$log" | tail -n 1)
        if [ "$code" = 0 ]; then passed "$title" "$count"; else failure "$title" "$log" "$code"; fi
    done
}

check_sanitizer() {
    local tool=compute-sanitizer kind code log
    if ! command -v "$tool" >/dev/null; then tool=/usr/local/cuda/bin/compute-sanitizer; fi
    if ! command -v "$tool" >/dev/null; then skipped "compute-sanitizer" "not on this machine"; return; fi
    # Short ones: copies and capture, one convolution, the loss, the optimisers.
    for kind in memcheck racecheck; do
        log=$logs/sanitizer-$kind.log
        run "$log" 600 "$tool" --tool "$kind" --error-exitcode 9 "$bin/tests/boxwright" \
            device::cuda::tests ops::border ops::max_pool2d ops::upsample_nearest ops::image_input detection_cuda optim::cuda \
            --test-threads=1
        code=$?
        if [ "$code" = 0 ]; then
            passed "compute-sanitizer $kind" "$(grep -o 'ERROR SUMMARY.*' "$log" | tail -n 1)"
        else
            failure "compute-sanitizer $kind" "$log" "$code"
        fi
    done
}

# ---- start ------------------------------------------------------------------------------------------------------
check_start() {
    local kind took code
    for kind in cold warm; do
        took=$(BOXWRIGHT_KERNEL_CACHE=$work/start-cache seconds run "$logs/start-$kind.log" "$step_limit" "$boxwright" \
            bench step --device cuda --model yolov8n --imgsz "$imgsz" --batch "$batch" --warmup 0 --steps 1 --json)
        code=$?
        if [ "$code" = 0 ]; then passed "start to first step, $kind cache" "$took s"; else failure "start, $kind cache" "$logs/start-$kind.log" "$code"; fi
    done
}

# ---- training ---------------------------------------------------------------------------------------------------
check_train() {
    local amp log code
    for amp in true false; do
        if [ -n "$emulated" ] && [ "$amp" = true ]; then skipped "training, amp $amp" "too slow on the emulated device"; continue; fi
        log=$logs/train-amp-$amp.log
        (cd "$work" && run "$log" "$train_limit" "$boxwright" train --device cuda --json model=yolov8n "data=$data" \
            "epochs=$epochs" "imgsz=$imgsz" "batch=$batch" "amp=$amp" workers=8 plots=false seed=0 "name=amp-$amp")
        code=$?
        if [ "$code" = 0 ]; then
            passed "yolov8n, $name, $epochs epochs, amp $amp" "mAP50 $(field 'metrics\/mAP50(B)' "$log"), mAP50-95 $(field 'metrics\/mAP50-95(B)' "$log"), $(field seconds "$log") s"
        else
            failure "yolov8n, $name, amp $amp" "$log" "$code"
        fi
    done
}

# numbers FILE: the sum of a weights file behind its header, which names the run.
numbers() { tail -c +$((9 + $(od -An -tu8 -N8 "$1"))) "$1" | sha256sum; }

# An undisturbed run, and one that is interrupted after a few steps and resumed, must end in the same weights.
check_resume() {
    local log=$logs/resume.log limit=600 pid waited=0 code whole resumed folder
    local job=(--device cuda --json model=yolov8n "data=$tiny" epochs=100 "imgsz=$tiny_size" batch=4 workers=2 plots=false "project=$work/resume")
    if [ -n "$emulated" ]; then job+=(amp=false epochs=3); fi
    run "$log" "$limit" "$boxwright" train "${job[@]}" name=whole
    code=$?
    if [ "$code" != 0 ]; then failure "resume: the undisturbed run" "$log" "$code"; return; fi
    "$boxwright" train "${job[@]}" name=cut >"$log.cut" 2>&1 &
    pid=$!
    folder=$work/resume/cut
    # Until its first step is written down; before that there is no such file.
    while ! grep -q '"event":"step"' "$folder/events.jsonl" 2>/dev/null; do
        if ! kill -0 "$pid" 2>/dev/null || [ "$waited" -gt $((limit * 10)) ]; then break; fi
        sleep 0.1
        waited=$((waited + 1))
    done
    # Not SIGINT, which the shell lets its background commands ignore.
    kill -TERM "$pid" 2>/dev/null
    wait "$pid"
    code=$?
    if [ "$code" != 130 ]; then failure "resume: the interrupted run" "$log.cut" "$code"; return; fi
    run "$log.resumed" "$limit" "$boxwright" train --device cuda --json --resume "$folder"
    code=$?
    if [ "$code" != 0 ]; then failure "resume: the resumed run" "$log.resumed" "$code"; return; fi
    whole=$(numbers "$work/resume/whole/weights/last.safetensors")
    resumed=$(numbers "$folder/weights/last.safetensors")
    if [ "$whole" = "$resumed" ]; then
        passed "resume" "interrupted and resumed: the same weights, bit for bit (${whole:0:12})"
    else
        row "resume" FAILED "the weights differ from those of the undisturbed run"
        failed=$((failed + 1))
    fi
}

# ---- speed ------------------------------------------------------------------------------------------------------
check_profile() {
    local model log code
    for model in $step_models; do
        log=$logs/profile-$model.json
        run "$log" "$step_limit" "$boxwright" profile "$model" --device cuda --imgsz "$imgsz" --batch "$batch" \
            --warmup "$warmup" --steps "$steps" --json
        code=$?
        if [ "$code" = 0 ]; then
            passed "profile $model" "step $(field step_ms "$log") ms, kernels $(field kernels_ms "$log") ms, floor $(field floor_ms "$log") ms at $imgsz px, batch $batch"
            "$boxwright" profile "$model" --device cuda --imgsz "$imgsz" --batch "$batch" >"$logs/profile-$model.txt" 2>&1
        else
            failure "profile $model" "$log" "$code"
        fi
    done
}

# The reference's best of several precisions and layouts, images per second; nothing where it cannot run.
peer() {
    local best=0 form log figure
    for form in "--amp fp16" "--amp bf16" "--amp fp16 --channels-last" "--amp bf16 --channels-last"; do
        log=$logs/peer-$1-$2-${form//[^a-z0-9]/}.json
        # shellcheck disable=SC2086 # the form is several words
        timeout --kill-after=10 "$step_limit" python3 benches/peer_step.py --model "$1.yaml" --imgsz "$imgsz" --batch "$2" \
            --steps "$steps" --warmup "$warmup" --device cuda $form >"$log" 2>"$log.err" || continue
        figure=$(field img_s "$log")
        best=$(awk -v a="$best" -v b="${figure:-0}" 'BEGIN { print a > b ? a : b }')
    done
    echo "$best"
}

check_speed() {
    local model size log code ours theirs compared=
    if [ -z "$emulated" ] && python3 -c 'import torch, ultralytics; assert torch.cuda.is_available()' 2>/dev/null; then compared=yes; fi
    for model in $step_models; do
        for size in $batches; do
            log=$logs/step-$model-$size.json
            run "$log" "$step_limit" "$boxwright" bench step --device cuda --model "$model" --imgsz "$imgsz" --batch "$size" \
                --warmup "$warmup" --steps "$steps" --json
            code=$?
            if [ "$code" != 0 ]; then failure "step $model, batch $size" "$log" "$code"; continue; fi
            ours=$(field img_s "$log")
            if [ -n "$compared" ]; then
                theirs=$(peer "$model" "$size")
                passed "step $model, $imgsz px, batch $size" "$ours images/s; reference $theirs images/s; $(awk -v a="$ours" -v b="$theirs" 'BEGIN { if (b > 0) printf "%.2f times", a / b; else print "no comparison" }')"
            else
                passed "step $model, $imgsz px, batch $size" "$ours images/s; no reference on this machine"
            fi
        done
    done
}

for step in tests sanitizer start train resume profile speed; do
    if has "$step"; then "check_$step"; fi
done

table() {
    printf '# GPU check, %s\n\n' "$(date -u +%F)"
    if [ -f "$bin/BUILD" ]; then sed 's/$/  /' "$bin/BUILD"; echo; fi
    if [ -n "$emulated" ]; then printf 'On the emulated device: no time below means anything.\n\n'; fi
    printf '| what | | result |\n|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
}
printf '\n'
table
if [ -n "${OUT:-}" ]; then table >"$OUT/gpu-check.md"; fi
[ "$failed" = 0 ]
