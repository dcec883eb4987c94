#!/usr/bin/env bash
# Speed of the training step with all side services well out of the way and with all of them dead but accepting connections
# (black holes: the worst of outages, every call waits for its limit). The shapes example, on the CPU, in turn.
#
#   benches/outage_step.sh [ROUNDS]            needs a release build, python3 and a machine with nothing else to do
#
# Prints the median images per second of the steps of each run (the first epoch left out).
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3}
program="$(pwd)/${CARGO_TARGET_DIR:-target}/release/boxwright"
out=$(mktemp -d "${TMPDIR:-/tmp}/boxwright-outage.XXXXXX")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$out"' EXIT

cat >"$out/holes.py" <<'PY'
import socket, threading, time
held = []
def serve(listener):
    while True:
        held.append(listener.accept()[0])
ports = []
for _ in range(3):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    ports.append(listener.getsockname()[1])
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
print(*ports, flush=True)
time.sleep(86400)
PY
mkfifo "$out/ports"
python3 "$out/holes.py" >"$out/ports" &
read -r redis store mlflow <"$out/ports"

"$program" dataset synth --help >/dev/null
for round in $(seq "$rounds"); do
    for kind in calm outage; do
        folder="$out/$kind-$round"
        mkdir -p "$folder/configs" "$folder/datasets"
        if [ -d datasets/shapes ]; then cp -r datasets/shapes "$folder/datasets/"; fi
        sed 's/epochs: .*/epochs: 6/' configs/shapes.yaml >"$folder/configs/shapes.yaml"
        environment=(MACHINE_ID="outage-$kind")
        if [ "$kind" = outage ]; then
            environment+=(REDIS_URL="redis://127.0.0.1:$redis" MINIO_ENDPOINT="http://127.0.0.1:$store" MINIO_ID=x
                MINIO_SECRET_KEY=xxxxxxxx MLFLOW_TRACKING_URI="http://127.0.0.1:$mlflow" HEARTBEAT_INTERVAL=1)
        fi
        (cd "$folder" && env "${environment[@]}" "$program" run &>"$folder/log") &
        service=$!
        for _ in $(seq 1200); do
            if "$program" status shapes --state-dir "$folder/state" --json 2>/dev/null | grep -q '"state":"completed"'; then break; fi
            sleep 0.5
        done
        kill -TERM "$service"
        wait "$service" || true
    done
done
python3 - "$out" "$rounds" <<'PY'
import glob, json, statistics, sys
out, rounds = sys.argv[1], int(sys.argv[2])
print("| services | images/s, median of each run |")
print("|---|---|")
for kind in ("calm", "outage"):
    medians = []
    for number in range(1, rounds + 1):
        [path] = glob.glob(f"{out}/{kind}-{number}/runs/**/events.jsonl", recursive=True)
        steps = [json.loads(line) for line in open(path)]
        speeds = [e["images_per_second"] for e in steps if e["event"] == "step" and e["epoch"] > 1]
        medians.append(statistics.median(speeds))
    print(f"| {kind} | {', '.join(f'{m:.1f}' for m in medians)} |")
PY
