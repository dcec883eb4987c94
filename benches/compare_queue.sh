#!/usr/bin/env bash
# The same N jobs that do nothing through Boxwright and through Celery, by one Redis, in turn: jobs per second, memory.
#
#   benches/compare_queue.sh [ROUNDS]          JOBS=1000 SLOTS=2 benches/compare_queue.sh 3
#
# A job of ours is a process of its own (tests/support/noop_trainer.c), journalled and reported. Celery's is a function call
# in a warm worker (`noop`), and for the same isolation a process as well (`process`). Redis writes an append-only file, as
# a queue should. Needs a machine with nothing else to do, cc, cargo, python3 and Redis; Celery is fetched into an
# environment of its own. OURS= measures Celery alone. Results as JSON lines go to $OUT when it is set.
set -euo pipefail
cd "$(dirname "$0")/.."

celery_version=5.7.0
rounds=${1:-3}
jobs=${JOBS:-1000}
slots=${SLOTS:-2}
out=$(mktemp -d "${TMPDIR:-/tmp}/boxwright-queue.XXXXXX")
server=
cleanup() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    wait || true
    rm -rf "$out"
}
trap cleanup EXIT

places=$(scripts/services.sh --cached)
eval "$places"
[ -n "${BOXWRIGHT_REDIS_SERVER:-}" ] || { echo "there is no redis-server; scripts/services.sh provides it" >&2; exit 1; }

celery="${BOXWRIGHT_SERVICES:-$HOME/.cache/boxwright-services}/celery-$celery_version"
if [ ! -e "$celery/complete" ]; then
    rm -rf "$celery"
    python3 -m venv "$celery"
    "$celery/bin/python" -m pip install --quiet --disable-pip-version-check "celery[redis]==$celery_version" >&2
    touch "$celery/complete"
fi

ours=${OURS-boxwright}
if [ -n "$ours" ]; then
    cargo build --release --quiet
    cc -O2 -o "$out/noop_trainer" tests/support/noop_trainer.c
    ours=${CARGO_TARGET_DIR:-target}/release/boxwright
fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir "$out/redis"
"$BOXWRIGHT_REDIS_SERVER" --bind 127.0.0.1 --port "$port" --dir "$out/redis" --appendonly yes --save '' \
    --maxmemory-policy noeviction >"$out/redis.log" &
server=$!
for _ in $(seq 100); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
    sleep 0.1
done

for round in $(seq "$rounds"); do
    if [ -n "$ours" ]; then
        REDIS_URL="redis://127.0.0.1:$port/2" BOXWRIGHT_TRAINER="$out/noop_trainer" \
            "$ours" bench queue --jobs "$jobs" --slots "$slots" --json >>"$out/ours"
    fi
    for task in noop process; do
        "$celery/bin/python" benches/peer_celery.py --redis "redis://127.0.0.1:$port" --jobs "$jobs" \
            --concurrency "$slots" --task "$task" >>"$out/$task"
    done
    echo "round $round of $rounds done" >&2
done
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    for name in ours noop process; do
        if [ -e "$out/$name" ]; then cp "$out/$name" "$OUT/queue-$name.jsonl"; fi
    done
fi

python3 - "$out" "$jobs" "$slots" <<'PY'
import json, os, statistics, sys
folder, jobs, slots = sys.argv[1:]
rows = [("ours", "Boxwright, a process for each job"), ("noop", "Celery, a function call"), ("process", "Celery, a process for each job")]
print(f"| {jobs} jobs, {slots} at a time | jobs/s, median (min..max) | peak resident MiB, all processes |")
print("|---|---|---|")
for name, words in rows:
    path = f"{folder}/{name}"
    if not os.path.exists(path):
        continue
    lines = [json.loads(line) for line in open(path)]
    rates = [line["jobs_per_second"] for line in lines]
    peak = max(line["peak_rss_bytes"] for line in lines) / 2**20
    print(f"| {words} | {statistics.median(rates):.0f} ({min(rates):.0f}..{max(rates):.0f}) | {peak:.0f} |")
PY
