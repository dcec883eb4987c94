#!/usr/bin/env python3
"""The queue of the older workers, measured: N jobs through Celery's prefork workers and Redis.

    peer_celery.py --redis redis://127.0.0.1:6379 --jobs 1000 --concurrency 2 --task noop

Acknowledged late and fetched one at a time, as jobs that train for hours must be. `--task noop` calls an empty function
in a warm worker; `--task process` starts /bin/true and waits, since a job that may crash or fill a GPU needs a process (or a
container) of its own. The worker is warm before the clock starts; the clock runs from the first push to the last result.
Prints one line of JSON; memory is the peak of the sum over the worker's processes, resident and proportional.
Needs celery[redis]; the databases 0 (broker) and 1 (results) of the server are emptied.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from celery import Celery

BROKER = os.environ.get("PEER_REDIS", "redis://127.0.0.1:6379")
LIMIT_S = 600.0

app = Celery("peer_celery", broker=f"{BROKER}/0", backend=f"{BROKER}/1")
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


@app.task
def noop(number):
    return number


@app.task
def process(number):
    subprocess.run(["/bin/true"], check=True)
    return number


def family(root):
    """The process and all its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rsplit(")", 1)[1].split()[1])
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def memory(pids):
    """Bytes: resident, and with shared pages divided among those that share them."""
    rss = pss = 0
    for pid in pids:
        try:
            for line in pathlib.Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
                if line.startswith("Rss:"):
                    rss += int(line.split()[1]) * 1024
                elif line.startswith("Pss:"):
                    pss += int(line.split()[1]) * 1024
        except OSError:
            continue
    return rss, pss


def wait(what, condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"peer_celery: {what} did not happen within {LIMIT_S:.0f} s")
        time.sleep(0.01)


def measure(args, worker, store):
    peak = {"rss": 0, "pss": 0}
    over = threading.Event()

    def watch():
        while not over.wait(0.1):
            rss, pss = memory(family(worker.pid))
            peak["rss"], peak["pss"] = max(peak["rss"], rss), max(peak["pss"], pss)

    task = {"noop": noop, "process": process}[args.task]
    # One task through everything: connections are open, children forked.
    task.delay(-1).get(timeout=LIMIT_S)
    wait("the warm-up's result", lambda: store.dbsize() == 1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.monotonic()
    for number in range(args.jobs):
        task.apply_async((number,))
    pushed = time.monotonic()
    wait("the last result", lambda: store.dbsize() >= args.jobs + 1)
    ended = time.monotonic()
    over.set()
    watcher.join()
    return {
        "peer": "celery",
        "task": args.task,
        "jobs": args.jobs,
        "concurrency": args.concurrency,
        "seconds": round(ended - begun, 3),
        "push_seconds": round(pushed - begun, 3),
        "jobs_per_second": round(args.jobs / (ended - begun), 1),
        "peak_rss_bytes": peak["rss"],
        "peak_pss_bytes": peak["pss"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", default=BROKER)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--task", choices=["noop", "process"], default="noop")
    args = parser.parse_args()
    if args.redis != BROKER:
        # The application above is made when the module is read.
        os.environ["PEER_REDIS"] = args.redis
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import redis

    store = redis.Redis.from_url(f"{args.redis}/1")
    redis.Redis.from_url(f"{args.redis}/0").flushdb()
    store.flushdb()
    command = [sys.executable, "-m", "celery", "-A", "peer_celery", "worker", "--pool", "prefork"]
    command += ["--concurrency", str(args.concurrency), "--loglevel", "WARNING"]
    worker = subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).resolve().parent,
        # It warns at length when it is root, as in a container it is.
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        print(json.dumps(measure(args, worker, store)))
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


if __name__ == "__main__":
    main()
