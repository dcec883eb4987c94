#!/usr/bin/env bash
# A trainer that trains nothing: it speaks the protocol of `train-child` (JSON lines out, `stop` and `checkpoint` in, a
# result file, exit codes), so that the service can be tested in seconds.
#
# What it does is said by the job's `train.data`: stub:steps=20,pause=0.02,fail=12@5,...
#   steps=N      steps to do; each is a durable "checkpoint"      pause=S      seconds per step
#   fail=C@N     exit with code C after step N, first attempt     always=C@N   the same in every attempt, from step N on
#   signal=S@N   die of signal S after step N, first attempt      hang=N       say nothing more after step N, first attempt
#   deaf=1       ignore `stop`, `checkpoint`, end of input and SIGTERM
#   gpu_fail=N   on GPU N: exit with code 14 after the first step, in every attempt
#   files=1      also leave checkpoints, weights and a table, as a real run does, and go on from the newest checkpoint
#   junk=1       print lines that are no events                   quiet=1      leave no result file
#
# Asked for GPUs (`probe`), it shows what the file gpus.json of the working folder holds; without that file it has no
# answer. `probe --test UUID` fails for the identities in the file gpu_faults, and waits while the file gpu_slow is there.
set -u
if [[ ${1-} == probe ]]; then
    echo "$*" >>probes
    [[ -e gpus.json ]] || exit 3
    if [[ ${2-} != --test ]]; then cat gpus.json; exit 0; fi
    while [[ -e gpu_slow ]]; do sleep 0.02; done
    if grep -qsx -- "$3" gpu_faults; then echo '{"fault":"wrong numbers"}'; else echo '{"fault":null}'; fi
    exit 0
fi
[[ $1 == train-child && $2 == --spec ]] || exit 10
spec=$(<"$3")
text() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" <<<"$spec"; }
task_id=$(text task_id) run_dir=$(text run_dir) result_path=$(text result_path) data=$(text data)
attempt=$(sed -n 's/.*"attempt":\([0-9]*\).*/\1/p' <<<"$spec")
option() {
    local part parts
    IFS=, read -ra parts <<<"${data#*:}"
    for part in "${parts[@]}"; do [[ $part == "$1="* ]] && { printf '%s' "${part#*=}"; return; }; done
    printf '%s' "$2"
}
steps=$(option steps 20) pause=$(option pause 0.02) fail=$(option fail '') always=$(option always '')
gpu_fail=$(option gpu_fail '') device=$(text device)
files=$(option files '') signal=$(option signal '') hang=$(option hang '') deaf=$(option deaf '') junk=$(option junk '') quiet=$(option quiet '')

say() { printf '%s\n' "$1"; }
result() { # status fitness
    [[ -n $quiet ]] && return
    printf '{"task_id":"%s","attempt":%s,"status":"%s","fitness":%s,"metrics":{"metrics/mAP50(B)":0.91},"epochs":%s,"best":"%s/weights/best.safetensors","last":"%s/weights/last.safetensors"}' \
        "$task_id" "$attempt" "$1" "$2" "$step" "$run_dir" "$run_dir" >"$result_path.tmp" || exit 15
    mv "$result_path.tmp" "$result_path" || exit 15
}
save() {
    printf '%s' "$step" >"$run_dir/stub_step.tmp" && mv "$run_dir/stub_step.tmp" "$run_dir/stub_step" || exit 15
    [[ -z $files ]] || keep || exit 15
}
# A checkpoint with the trailer of a real one (magic, SHA-256 of what is before), weights, a table.
keep() {
    local part="$run_dir/state/part.tmp" name old
    mkdir -p "$run_dir/state" "$run_dir/weights" || return 1
    printf 'step %s of the stub\n' "$step" >"$part" || return 1
    local sum
    sum=$(sha256sum <"$part") && sum=${sum%% *}
    printf 'BXWRCK01' >>"$part" && printf '%b' "$(sed 's/../\\x&/g' <<<"$sum")" >>"$part" || return 1
    name=$(printf 'step-%09d.ckpt' "$step")
    mv "$part" "$run_dir/state/$name" || return 1
    for old in $(ls -r "$run_dir/state" | grep ckpt | tail -n +3); do rm -f "$run_dir/state/$old"; done
    for name in best last; do
        printf 'weights of step %s' "$step" >"$run_dir/weights/part.tmp" &&
            mv "$run_dir/weights/part.tmp" "$run_dir/weights/$name.safetensors" || return 1
    done
    echo "$step" >>"$run_dir/results.csv"
}
[[ -n $deaf ]] && trap '' TERM INT
[[ -z $deaf ]] && trap 'save; exit 131' TERM

step=0
[[ -s $run_dir/stub_step ]] && step=$(<"$run_dir/stub_step")
if [[ -n $files && -d $run_dir/state ]]; then
    newest=$(ls -r "$run_dir/state" | grep -m 1 ckpt)
    # What another machine did counts when it came further.
    kept=$((10#$(sed 's/[^0-9]//g' <<<"${newest:-0}")))
    ((kept > step)) && step=$kept
fi
# Proofs of what must never happen: training after completion, and two trainers at once.
[[ -e $run_dir/complete ]] && echo "attempt $attempt after completion" >>"$run_dir/violations"
alive() { # neither gone, nor dead and not yet waited for, nor another process of that number
    grep -qE '^State:.[^ZX]' "/proc/$1/status" 2>/dev/null && grep -qa -- "$task_id.json" "/proc/$1/cmdline" 2>/dev/null
}
if [[ -e $run_dir/pid ]] && alive "$(<"$run_dir/pid")"; then echo "two at once" >>"$run_dir/violations"; fi
printf '%s' $$ >"$run_dir/pid" || exit 15
echo "$attempt from $step" >>"$run_dir/attempts" || exit 15
echo "$device $(text gpu_uuid)" >>"$run_dir/devices" || exit 15
echo "12:00:00 | WARNING  | stub trainer speaks" >&2
[[ -n $junk ]] && { say 'this is no event'; say '{"half": '; say '[1, 2]'; printf 'no end of line\n'; }
say '{"event":"started","task_id":"'"$task_id"'","pid":'$$'}'
say '{"event":"plan","batch":4,"batches":1,"epochs":'"$steps"'}'

rest=''
while ((step < steps)); do
    if [[ -n $deaf ]]; then
        sleep "$pause"
    elif read -r -t "$pause" part; then
        line=$rest$part rest=''
        case $line in
        stop)
            save
            result cancelled null
            say '{"event":"finished","outcome":"stopped","metrics":{},"epochs":'"$step"'}'
            exit 130
            ;;
        checkpoint) save && say '{"event":"checkpoint","path":"stub_step","epoch":'"$step"',"step":'"$step"'}' ;;
        esac
    elif (($? <= 128)); then
        save
        exit 131
    else
        rest+=$part # the time may end in the middle of a word
    fi
    step=$((step + 1))
    echo "$step" >>"$run_dir/steps" # before the checkpoint: a kill between the two repeats a step, and loses none
    save
    [[ -z $files ]] || say '{"event":"checkpoint","path":"'"$run_dir"'/state","epoch":'"$step"',"step":'"$step"'}'
    say '{"event":"step","epoch":'"$step"',"step":'"$step"',"epochs":'"$steps"',"batch":1,"batches":1,"box_loss":1.5,"images_per_second":50.0}'
    say '{"event":"epoch","epoch":'"$step"',"epochs":'"$steps"',"columns":{"train/box_loss":1.5},"fitness":0.5,"is_best":true}'
    if [[ $hang == "$step" && $attempt == 1 ]]; then sleep 1000; fi
    if [[ -n $signal && $attempt == 1 && ${signal#*@} == "$step" ]]; then kill "-${signal%@*}" $$; sleep 5; fi
    order=''
    [[ -n $fail && $attempt == 1 && ${fail#*@} == "$step" ]] && order=$fail
    [[ -n $gpu_fail && $device == "cuda:$gpu_fail" ]] && order=14
    [[ -n $always ]] && ((step >= ${always#*@})) && order=$always
    if [[ -n $order ]]; then
        say '{"event":"failed","class":"stub","message":"the stub failed on purpose at step '"$step"'"}'
        exit "${order%@*}"
    fi
done
result completed 0.5
echo "$attempt" >>"$run_dir/complete"
say '{"event":"finished","outcome":"completed","metrics":{"metrics/mAP50(B)":0.91},"fitness":0.5,"epochs":'"$steps"'}'
exit 0
