"""Time to first token of the demo's forks, multipole server beside its dense twin.

    python -m benchmarks.fork_first_token --model-path DIR --csv out.csv

As in `make demo`: the prompt of examples/best_of_n.py is prefilled once, then as many answers are
sampled from it side by side. The cache is emptied before each repeat, so that a multipole server
clusters the prompt anew each time. Servers take turns; a row is one fork. `--overlap` has SGLang
launch a step before it has sent the tokens of the one before, which is its default on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.csv_file import write_rows
from benchmarks.token_stream import TokenStream, run_together
from benchmarks.versions import versions
from sglang_multipole.local_server import LocalServer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import best_of_n
import demo

DISABLE_OVERLAP = "--disable-overlap-schedule"
NUM_TOKENS = 8  # of each answer: the first, and steps during which the prompt is clustered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server")
    parser.add_argument("--repeats", type=int, default=3, help="of the forks, in each round")
    parser.add_argument("--overlap", action="store_true", help="schedule with overlap")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    common = [flag for flag in demo.COMMON_FLAGS if flag != DISABLE_OVERLAP]
    if not arguments.overlap:
        common.append(DISABLE_OVERLAP)
    rows: list[dict[str, Any]] = []
    for round_number in range(arguments.rounds):
        for name, flags in (("dense", []), ("multipole", demo.MULTIPOLE_FLAGS)):
            with tempfile.TemporaryDirectory() as folder:
                all_flags, log = [*common, *flags], Path(folder) / "server.log"
                with LocalServer(arguments.model_path, all_flags, log) as server:
                    for repeat in range(arguments.repeats):
                        for fork, row in enumerate(measure(server)):
                            place = {"overlap": arguments.overlap, "server": name}
                            place |= {"round": round_number, "repeat": repeat, "fork": fork}
                            rows.append(place | row | versions())
                            print(rows[-1], flush=True)
            write_rows(arguments.csv, rows)
    report(rows)
    return 0


def measure(server: LocalServer) -> list[dict[str, Any]]:
    """One row a fork."""
    server.get("/flush_cache")
    prompt = demo.best_of_n_text()
    # as fork does
    server.post("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 0}})
    sampling = {"temperature": best_of_n.TEMPERATURE}
    streams = [
        TokenStream(server, prompt, NUM_TOKENS, sampling) for _ in range(best_of_n.NUM_SAMPLES)
    ]
    run_together(streams)
    rows = []
    for stream in streams:
        activity = stream.meta_info.get("multipole")
        if activity is not None and activity["sparse_steps"] != NUM_TOKENS - 1:
            raise RuntimeError(f"fork_first_token: all steps must be sparse, got {activity}")
        rows.append(
            {
                "cached_tokens": stream.meta_info["cached_tokens"],
                "prompt_tokens": stream.meta_info["prompt_tokens"],
                "first_token_ms": round(1e3 * stream.first_token_seconds, 1),
                "second_token_ms": round(1e3 * (stream.times[1] - stream.began), 1),
                "segments_built": activity["segments_built"] if activity else "",
                "segments_shared": activity["segments_shared"] if activity else "",
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Medians over all forks."""
    for name in ("dense", "multipole"):
        for column in ("first_token_ms", "second_token_ms"):
            values = [row[column] for row in rows if row["server"] == name]
            print(f"{name:>10} {column:>16} median {statistics.median(values):8.1f}")


if __name__ == "__main__":
    sys.exit(main())
