"""Time per output token of a whole server, multipole attention beside its dense twin.

    python -m benchmarks.time_per_token --model-path DIR --points 32768x1,32768x8 --csv out.csv \
        -- --load-format dummy --attention-backend flashinfer --context-length 131072

What follows `--` are flags of both servers. Each point is context x batch: that many requests of
random tokens, decoded together. A longer point's prompts begin with those of a shorter one, so that
the radix cache spares most of the prefills. Only steps in which all of them decode are counted. A
multipole row whose steps were not all sparse (or, below the gate, all dense) is an error, not a
result.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.csv_file import write_rows
from benchmarks.token_stream import TokenStream, run_together
from benchmarks.versions import versions
from sglang_multipole.local_server import LocalServer

VOCABULARY = 30000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--points", default="2048x1,32768x1,32768x8,65536x5,130048x1")
    parser.add_argument("--num-tokens", type=int, default=256, help="generated per request")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each point")
    parser.add_argument("--multipole-config", default='{"token_budget": 1024}')
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--logs", type=Path, help="a folder for the servers' logs")
    parser.add_argument("--seed", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    points = [tuple(map(int, point.split("x"))) for point in arguments.points.split(",")]
    sparse = ["--enable-multipole", f"--multipole-config={arguments.multipole_config}"]
    rows: list[dict[str, Any]] = []
    for name, own_flags in (("multipole", sparse), ("dense", [])):
        with tempfile.TemporaryDirectory() as folder:
            log = (arguments.logs or Path(folder)) / f"server_{name}.log"
            with LocalServer(arguments.model_path, [*flags, *own_flags], log) as server:
                for _ in range(arguments.rounds):
                    for context, batch in points:
                        row = measure(server, context, batch, arguments)
                        rows.append({"server": name, **row, **versions()})
                        print(json.dumps(rows[-1]), flush=True)
                        write_rows(arguments.csv, rows)
    report(rows)
    return 0


def measure(
    server: LocalServer, context: int, batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Decode `batch` random requests together; milliseconds between their tokens."""
    prompts = []
    for index in range(batch):
        generator = random.Random(f"{arguments.seed} {index}")
        prompts.append([generator.randrange(100, VOCABULARY) for _ in range(context)])
    streams = [TokenStream(server, prompt, arguments.num_tokens) for prompt in prompts]
    run_together(streams)
    # all decode: after the last has begun and before the first has ended
    begin = max(stream.times[1] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    steps = sorted(
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in zip(stream.times[1:], stream.times[2:], strict=False)
        if begin <= earlier and later <= end
    )
    if len(steps) < 16:
        raise RuntimeError(
            f"time_per_token: only {len(steps)} steps with all {batch} requests decoding; "
            "raise --num-tokens"
        )
    activities = [stream.meta_info.get("multipole") for stream in streams]
    return {
        "context": context,
        "batch": batch,
        "steps": len(steps),
        "p50_ms": round(statistics.median(steps), 3),
        "mean_ms": round(statistics.fmean(steps), 3),
        "p99_ms": round(steps[int(len(steps) * 0.99)], 3),
        "max_ms": round(steps[-1], 3),
        "first_token_s": round(max(s.first_token_seconds for s in streams), 3),
        # a multipole server clusters the prompts before their first decode step
        "second_token_s": round(max(s.times[1] - s.times[0] for s in streams), 3),
        **_activity(activities, server),
    }


def _activity(activities: list[dict[str, int] | None], server: LocalServer) -> dict[str, Any]:
    """The proof that what was measured is what the row says."""
    if activities[0] is None:
        return {"sparse_steps": "", "dense_steps": "", "exact_share": ""}
    sums = {key: sum(a[key] for a in activities) for key in activities[0]}
    if sums["sparse_steps"] and sums["dense_steps"]:
        raise RuntimeError(
            f"time_per_token: {sums['dense_steps']} of the steps were dense and "
            f"{sums['sparse_steps']} sparse; a point must lie on one side of min_context"
        )
    return {
        "sparse_steps": sums["sparse_steps"],
        "dense_steps": sums["dense_steps"],
        "exact_share": round(sums["exact_tokens"] / sums["context_tokens"], 4),
    }


def report(rows: list[dict[str, Any]]) -> None:
    """The table, from the rows."""
    print("\ncontext x batch    dense ms  multipole ms   ratio   exact share")
    medians: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        point = medians.setdefault((row["context"], row["batch"]), {})
        point.setdefault(row["server"], []).append(row["p50_ms"])
    for (context, batch), by_server in medians.items():
        dense, sparse = (statistics.median(by_server[name]) for name in ("dense", "multipole"))
        share = next(
            row["exact_share"]
            for row in rows
            if (row["server"], row["context"], row["batch"]) == ("multipole", context, batch)
        )
        ratio = dense / sparse
        print(f"{context:>7} x {batch:<4} {dense:>12.2f} {sparse:>12.2f} {ratio:>8.2f}x {share}")


if __name__ == "__main__":
    sys.exit(main())
