"""Inter-token latency while subscribers of the event stream are killed and started again.

    python -m benchmarks.event_subscriber --model-path DIR --csv out.csv

One server under a steady load; the arms take turns every few seconds, in random order:

    none         no process beside the load
    bystander    a process that connects to a silent address, killed and started again
    subscriber   the same process on the server's events

A process costs the machine its start whatever it listens to, so what the event stream costs is
`subscriber` beside `bystander`. A row of the table is an arm; p99_low and p99_high are the 5th and
95th percentile of its p99 over resampled periods, which is the noise.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.csv_file import write_rows
from benchmarks.token_stream import TokenStream
from benchmarks.versions import versions
from sglang_multipole.local_server import LocalServer, find_free_port

NUM_REQUESTS = 3
CONTEXT = 700
NUM_TOKENS = 150
PERIOD_SECONDS = 8.0
LIFE_SECONDS = 2.0  # of a subscriber
SKIPPED_TOKENS = 3  # the first of an answer: prefill and clustering
NUM_RESAMPLED = 500
MULTIPOLE = {"token_budget": 128, "min_context": 640, "events_interval_ms": 50}
SUBSCRIBER = """
import sys, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.subscribe(b"")
socket.connect(sys.argv[1])
while True:
    socket.recv_multipart()
"""


class Load:
    """Requests with fixed prompts, sent again whenever they are answered."""

    def __init__(self, server: LocalServer):
        generator = random.Random(1)
        self._server = server
        self._prompts = [
            [generator.randrange(100, 30000) for _ in range(CONTEXT)] for _ in range(NUM_REQUESTS)
        ]
        self._running: list[TokenStream | None] = [None] * NUM_REQUESTS
        self.ended: list[TokenStream] = []

    def keep_up(self) -> None:
        """Send anew what has been answered.

        Raises:
            RuntimeError: a request failed.
        """
        for index, stream in enumerate(self._running):
            if stream is not None and stream.is_alive():
                continue
            if stream is not None:
                if stream.error:
                    raise RuntimeError(f"event_subscriber: a request failed: {stream.error}")
                self.ended.append(stream)
            self._running[index] = TokenStream(self._server, self._prompts[index], NUM_TOKENS)
            self._running[index].start()

    def latencies(self) -> list[tuple[float, float]]:
        """(time.perf_counter() of a token, milliseconds since the one before) of ended requests."""
        return [
            (later, 1e3 * (later - earlier))
            for stream in self.ended
            for earlier, later in zip(
                stream.times[SKIPPED_TOKENS:], stream.times[SKIPPED_TOKENS + 1 :], strict=False
            )
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=25, help="periods of each arm")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    endpoint, silent = (f"tcp://127.0.0.1:{find_free_port()}" for _ in range(2))
    config = json.dumps(MULTIPOLE | {"events_endpoint": endpoint})
    flags = ["--enable-multipole", f"--multipole-config={config}", "--max-total-tokens=12288"]
    arms = {"none": "", "bystander": silent, "subscriber": endpoint}
    periods: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalServer(arguments.model_path, flags, Path(folder) / "server.log") as server,
    ):
        load = Load(server)
        while len(load.ended) < NUM_REQUESTS:
            load.keep_up()
            time.sleep(0.05)
        for number in range(arguments.rounds):
            for arm in random.Random(number).sample(list(arms), len(arms)):
                begin = time.perf_counter()
                killed = run_period(load, arms[arm])
                end = time.perf_counter()
                periods.append({"arm": arm, "begin": begin, "end": end, "killed": killed})
        num_enough = len(load.ended) + NUM_REQUESTS
        while len(load.ended) < num_enough:
            load.keep_up()
            time.sleep(0.05)
        state = json.loads(server.get("/server_info"))["internal_states"][0]["multipole"]
    dropped, totals = state["events"]["dropped"], state["totals"]
    if not totals["sparse_steps"]:
        raise RuntimeError(f"event_subscriber: no step was sparse: {totals}")
    activity = {name: totals[name] for name in ("sparse_steps", "dense_steps")}
    rows = [row | activity | versions() for row in summarize(periods, load.latencies(), dropped)]
    write_rows(arguments.csv, rows)
    for row in rows:
        print(row)
    return 0


def run_period(load: Load, endpoint: str) -> int:
    """Keep the load up for one period; how many subscribers of endpoint were killed in it."""
    end, killed = time.perf_counter() + PERIOD_SECONDS, 0
    process, process_end = None, 0.0
    try:
        while time.perf_counter() < end:
            load.keep_up()
            if endpoint and time.perf_counter() >= process_end:
                if process is not None:
                    process.kill()
                    process.wait()
                    killed += 1
                process = subprocess.Popen([sys.executable, "-c", SUBSCRIBER, endpoint])
                process_end = time.perf_counter() + LIFE_SECONDS
            time.sleep(0.05)
    finally:
        if process is not None:
            process.kill()
            process.wait()
            killed += 1
    return killed


def summarize(
    periods: list[dict[str, Any]], latencies: list[tuple[float, float]], dropped: int
) -> list[dict[str, Any]]:
    """One row an arm."""
    for period in periods:
        period["ms"] = [ms for at, ms in latencies if period["begin"] <= at < period["end"]]
    rows = []
    for arm in ("none", "bystander", "subscriber"):
        own = [period for period in periods if period["arm"] == arm]
        everything = pooled(own)
        generator = random.Random(arm)
        p99s = sorted(
            quantile(pooled(generator.choices(own, k=len(own))), 0.99) for _ in range(NUM_RESAMPLED)
        )
        rows.append(
            {
                "arm": arm,
                "periods": len(own),
                "killed": sum(period["killed"] for period in own),
                "tokens": len(everything),
                "p50_ms": quantile(everything, 0.5),
                "p90_ms": quantile(everything, 0.9),
                "p99_ms": quantile(everything, 0.99),
                "p99_low_ms": quantile(p99s, 0.05),
                "p99_high_ms": quantile(p99s, 0.95),
                "max_ms": round(everything[-1], 1),
                "events_dropped": dropped,
            }
        )
    return rows


def pooled(periods: list[dict[str, Any]]) -> list[float]:
    return sorted(ms for period in periods for ms in period["ms"])


def quantile(ordered: list[float], share: float) -> float:
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 1)


if __name__ == "__main__":
    sys.exit(main())
