"""What runs on the GPU in a decode step of a real server: SGLang's profiler, summed by kernel."""

from __future__ import annotations

import collections
import gzip
import json
import re
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.token_stream import TokenStream
from sglang_multipole.local_server import LocalServer

NUM_STEPS = 20
WAIT_SECONDS = 30.0
WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def profile_steps(
    server: LocalServer, prompt: list[int], sampling: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Profile NUM_STEPS decode steps of one request; rows as of kernel_times.

    Raises:
        RuntimeError: the server left no trace.
    """
    stream = TokenStream(server, prompt, 20 * NUM_STEPS, sampling)
    with tempfile.TemporaryDirectory() as folder:
        stream.start()
        while stream.is_alive() and len(stream.times) < 2 * NUM_STEPS:
            time.sleep(0.001)
        body = {
            "output_dir": folder,
            "num_steps": NUM_STEPS,
            "activities": ["CPU", "GPU"],
            "with_stack": False,
            "record_shapes": False,
        }
        request = urllib.request.Request(
            f"{server.base_url}/start_profile",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=60).close()
        stream.join()
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for path in Path(folder).rglob("*.trace.json.gz"):
                try:
                    return kernel_times(json.loads(gzip.decompress(path.read_bytes())))
                except (EOFError, ValueError):  # still being written
                    continue
            time.sleep(0.2)
    raise RuntimeError(f"step_profile: no trace of the server; {server.last_log_lines()}")


def kernel_times(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (kernel, launches, us, adds_us), means of whole steps: the step, its idle time, kernels.

    A step is the time from one launch of a marker to the next: of all kernels that are launched
    about once a step, the one that takes longest. A kernel's us are from its start to its end;
    adds_us are without what ran when it started, as for a kernel that is launched early and waits.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat") in WORK]
    events.sort(key=lambda event: event["ts"])
    launches = collections.Counter(event["name"] for event in events)
    durations: collections.Counter[str] = collections.Counter()
    for event in events:
        durations[event["name"]] += event["dur"]
    once = [name for name, count in launches.items() if abs(count - NUM_STEPS) <= 1]
    marker = max(once, key=durations.__getitem__)
    begins = [event["ts"] for event in events if event["name"] == marker]
    num_steps = len(begins) - 1
    sums: dict[str, list[float]] = {}  # launches, us, adds_us
    busy_until, idle = begins[0], 0.0
    for event in events:
        begin, end = event["ts"], event["ts"] + event["dur"]
        if not begins[0] <= begin < begins[-1]:
            continue
        idle += max(begin - busy_until, 0.0)
        added = max(end - max(begin, busy_until), 0.0)
        busy_until = max(busy_until, end)
        total = sums.setdefault(_short(event["name"]), [0.0, 0.0, 0.0])
        for column, value in enumerate((1.0, event["dur"], added)):
            total[column] += value
    idle += max(begins[-1] - busy_until, 0.0)
    step = begins[-1] - begins[0]
    sums = {"(step)": [num_steps, step, step], "(nothing runs)": [num_steps, idle, idle]} | sums
    rows = [
        {"kernel": name}
        | {
            column: round(value / num_steps, 2)
            for column, value in zip(("launches", "us", "adds_us"), values, strict=True)
        }
        for name, values in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["adds_us"])


def _short(name: str) -> str:
    """A kernel's name without types and arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].strip() or name
