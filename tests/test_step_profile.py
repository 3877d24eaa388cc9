"""Sums over a profiler's trace: whole steps, idle time, and launches that wait for others."""

from __future__ import annotations

from typing import Any

from benchmarks.step_profile import NUM_STEPS, kernel_times


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"name": name, "cat": cat, "ts": ts, "dur": dur}


def test_times_are_of_whole_steps_and_add_up():
    events = [event("a launch", 0, 9, cat="cuda_runtime")]
    for step in range(NUM_STEPS):
        begin = 100.0 * step
        events += [
            event("void lm_head<int>(float)", begin, 40),
            # launched early: waits until the first has ended
            event("attend(int)", begin + 30, 30),
            event("attend(int)", begin + 70, 20),
            event("Memcpy DtoH (Device -> Pinned)", begin + 72, 2, cat="gpu_memcpy"),
        ]
    rows = {row["kernel"]: row for row in kernel_times({"traceEvents": events})}
    assert rows["(step)"]["us"] == 100
    # 10 before the second attend, 10 behind it
    assert rows["(nothing runs)"]["us"] == 20
    assert rows["lm_head"] == {"kernel": "lm_head", "launches": 1, "us": 40, "adds_us": 40}
    assert rows["attend"] == {"kernel": "attend", "launches": 2, "us": 50, "adds_us": 40}
    assert rows["Memcpy DtoH"]["adds_us"] == 0
    parts = [row["adds_us"] for name, row in rows.items() if name != "(step)"]
    assert sum(parts) == 100
