"""Time per output token of a whole server, multipole attention beside its dense twin.

    python -m benchmarks.time_per_token --model-path DIR --points 32768x1,32768x8 --csv out.csv \
        -- --load-format dummy --attention-backend flashinfer --context-length 131072

What follows `--` are flags of both servers. Each point is context x batch: that many requests of
random tokens, decoded together. A longer point's prompts begin with those of a shorter one, so that
the radix cache spares most of the prefills. Only steps in which all of them decode and have their
clusters are counted; settled_s is the time from the last first token until then, longest_gap_ms the
longest time between two tokens of a request, from its second on. sparse_steps, dense_steps and the
clusterings (segments_built, open_builds; early_builds of both) are those of all its steps.

The rows `switched_off` are of the multipole server as well: the same requests, each with
`"multipole": false`, which are steps of SGLang's own dense attention and graphs, without another
start and without another prefill.

A point of the form 2048x4+65536 has a newcomer: its prompt is prefilled and clustered while the
others decode, and the steps are theirs while the newcomer decodes beside them.

SGLang's random weights (`--load-format dummy`) leave all attention scores equal, norms among them
being near 0; `--unit-norms` sets the norms of a Qwen3 to 1, which makes scores of random tokens
about normal, of variance 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import random_weights
from benchmarks.csv_file import write_rows
from benchmarks.step_profile import profile_steps
from benchmarks.token_stream import TokenStream, run_together
from benchmarks.versions import versions
from sglang_multipole.local_server import LocalServer

VOCABULARY = 30000
# of the requests, by kind of row
SAMPLING: dict[str, dict[str, Any] | None] = {
    "multipole": None,
    "switched_off": {"custom_params": {"multipole": False}},
    "dense": None,
}
NEWCOMER_TOKENS = 64
MARGIN = 32  # tokens of the running requests before the newcomer is sent, and after its end
WARM_UP_TOKENS = 9000  # a full chunk of a prefill, segments to cluster, steps above the gate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--points", default="32768x1,2048x1,32768x8,65536x5,130048x1")
    parser.add_argument("--num-tokens", type=int, default=256, help="generated per request")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each point")
    parser.add_argument("--multipole-config", default='{"token_budget": 1024}')
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--logs", type=Path, help="a folder for the servers' logs")
    parser.add_argument("--servers", default="multipole,dense", help="to start, in this order")
    parser.add_argument(
        "--profile", type=int, nargs="*", default=[], help="tokens of each profiled request"
    )
    parser.add_argument("--profile-csv", type=Path, help="what runs on the GPU in its steps")
    parser.add_argument("--unit-norms", action="store_true", help="of random weights")
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--seed", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    points = [Point.parse(point) for point in arguments.points.split(",")]
    own_flags = {
        "multipole": ["--enable-multipole", f"--multipole-config={arguments.multipole_config}"],
        "dense": [],
    }
    kinds = {"multipole": ["multipole", "switched_off"], "dense": ["dense"]}
    rows: list[dict[str, Any]] = []
    profiled: list[dict[str, Any]] = []
    for name in arguments.servers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            log = (arguments.logs or Path(folder)) / f"server_{name}.log"
            with LocalServer(arguments.model_path, [*flags, *own_flags[name]], log) as server:
                if arguments.unit_norms:
                    random_weights.set_norms_to_one(server, arguments.model_path)
                # compile what a first request compiles
                longest = max(max(point.context, point.newcomer) for point in points)
                warm_up = _prompt("warm-up", min(WARM_UP_TOKENS, longest))
                run_together([TokenStream(server, warm_up, 16)])
                for _ in range(arguments.rounds):
                    for point, kind in itertools.product(points, kinds[name]):
                        row = measure(server, point, kind, arguments)
                        rows.append({"server": kind, **row, **versions(arguments.commit)})
                        print(json.dumps(rows[-1]), flush=True)
                        write_rows(arguments.csv, rows)
                for context, kind in itertools.product(arguments.profile, kinds[name]):
                    prompt = _prompt(f"{arguments.seed} 0", context)
                    place = {"server": kind, "context": context}
                    profiled += [
                        place | row | versions(arguments.commit)
                        for row in profile_steps(server, prompt, SAMPLING[kind])
                    ]
                    write_rows(arguments.profile_csv, profiled)
    report(rows)
    return 0


@dataclasses.dataclass(frozen=True)
class Point:
    """`batch` requests of `context` tokens; beside them, if not 0, one of `newcomer` tokens."""

    context: int
    batch: int
    newcomer: int = 0

    @classmethod
    def parse(cls, text: str) -> Point:
        """From 32768x8, or 2048x4+65536."""
        running, _, newcomer = text.partition("+")
        context, batch = map(int, running.split("x"))
        return cls(context, batch, int(newcomer or 0))


def measure(
    server: LocalServer, point: Point, kind: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Decode random requests together; milliseconds between their tokens."""
    seed, num_tokens = arguments.seed, arguments.num_tokens
    sampling = SAMPLING[kind]
    prompts = [_prompt(f"{seed} {index}", point.context) for index in range(point.batch)]
    before = _builds(server)
    newcomers = []
    if point.newcomer:
        # long enough to be there when the newcomer has ended
        num_running = num_tokens + NEWCOMER_TOKENS + MARGIN
        streams = [TokenStream(server, prompt, num_running, sampling) for prompt in prompts]
        newcomer = _prompt(f"{seed} newcomer, {kind}", point.newcomer)
        newcomers.append(TokenStream(server, newcomer, NEWCOMER_TOKENS, sampling))
        run_together(streams, newcomers, after=MARGIN)
    else:
        streams = [TokenStream(server, prompt, num_tokens, sampling) for prompt in prompts]
        run_together(streams)
    steps = _steps_beside(streams, newcomers[0]) if newcomers else _steps_together(streams)
    if len(steps) < 16:
        raise RuntimeError(
            f"time_per_token: only {len(steps)} steps with all requests of {point} decoding; raise "
            "--num-tokens"
        )
    gaps = [b - a for s in streams for a, b in itertools.pairwise(s.times[1:])]
    asked = [*streams, *newcomers]
    return {
        **dataclasses.asdict(point),
        "steps": len(steps),
        "p50_ms": round(statistics.median(steps), 3),
        "mean_ms": round(statistics.fmean(steps), 3),
        "p99_ms": round(steps[int(len(steps) * 0.99)], 3),
        "p999_ms": round(steps[int(len(steps) * 0.999)], 3),
        "max_ms": round(steps[-1], 3),
        "longest_gap_ms": round(1e3 * max(gaps), 1),
        "first_token_s": round(max(s.first_token_seconds for s in asked), 3),
        # a multipole server clusters the prompts before their first decode steps
        "second_token_s": round(max(s.times[1] - s.times[0] for s in asked), 3),
        "settled_s": round(max(map(_settled, asked)) - max(s.times[0] for s in asked), 3),
        **_activity([stream.meta_info.get("multipole") for stream in asked]),
        **{key: number - before[key] for key, number in _builds(server).items()},
    }


def _steps_together(streams: list[TokenStream]) -> list[float]:
    """Sorted times of the steps in which all decode as they go on: from the last's clusters to the
    first's end, in ms."""
    begin = max(_settled(stream) for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    return sorted(
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in itertools.pairwise(stream.times[1:])
        if begin <= earlier and later <= end
    )


def _settled(stream: TokenStream) -> float:
    """When the request had its clusters: after the last step that read more than twice as many
    tokens exactly as its later ones; its second token in a dense server."""
    read = [after - before for before, after in itertools.pairwise(stream.exact_tokens)]
    usual = statistics.median(read[-len(read) // 4 :]) if read else 0
    more = [index for index, tokens in enumerate(read) if tokens > 2 * usual]
    return stream.times[max(more, default=0) + 1]


def _steps_beside(streams: list[TokenStream], newcomer: TokenStream) -> list[float]:
    """Sorted times of the running requests' steps while the newcomer decodes, in ms; the first is
    what is left of it after the newcomer's first token, so without its prefill."""
    begin, end = newcomer.times[0], newcomer.times[-1]
    return sorted(
        1e3 * (later - max(earlier, begin))
        for stream in streams
        for earlier, later in itertools.pairwise(stream.times)
        if begin < later <= end
    )


def _prompt(seed: str, num_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100, VOCABULARY) for _ in range(num_tokens)]


def _builds(server: LocalServer) -> dict[str, Any]:
    """Clusterings since the start; early ones are among the others. 0 in a dense server."""
    state = json.loads(server.get("/server_info"))["internal_states"][0].get("multipole")
    names = ("segments_built", "open_builds", "early_builds")
    return {name: state["segments"][name] if state else 0 for name in names}


def _activity(activities: list[dict[str, int] | None]) -> dict[str, Any]:
    """The proof that what was measured is what the row says."""
    if activities[0] is None:
        return {"sparse_steps": "", "dense_steps": "", "exact_share": ""}
    sums = {key: sum(a[key] for a in activities) for key in activities[0]}
    return {
        "sparse_steps": sums["sparse_steps"],
        "dense_steps": sums["dense_steps"],
        "exact_share": round(sums["exact_tokens"] / sums["context_tokens"], 4),
    }


def report(rows: list[dict[str, Any]]) -> None:
    """The table, from the rows."""
    print("\ncontext x batch + newcomer     p50 ms   p99 ms   max ms  longest gap ms  exact share")
    for row in sorted(rows, key=lambda row: (row["context"], row["batch"], row["newcomer"])):
        point = f"{row['context']} x {row['batch']} + {row['newcomer']}"
        times = f"{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['max_ms']:9.2f}"
        print(
            f"{point:>26} {times} {row['longest_gap_ms']:>14} {row['exact_share']} {row['server']}"
        )


if __name__ == "__main__":
    sys.exit(main())
