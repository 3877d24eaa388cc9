"""Time each launch of a decode step under candidate configurations, for launch_config.py.

    python -m benchmarks.tune [--shapes 131072x1x1024,...] [--centroids bf16,fp8]

Each launch is timed alone and the three together; a configuration is first checked against the
reference. Prints a table, best first for each shape and launch.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from benchmarks.decode_inputs import (
    Geometry,
    groups_of_rows,
    make_rows,
    with_centroids,
)
from benchmarks.decode_points import QWEN3_ROPE_BASE
from benchmarks.decode_stages import relative_error, share_workspace, stage_calls
from benchmarks.timing import copy_bandwidth, read_bandwidth, time_graph

CANDIDATES = {
    "coarse": {
        "coarse_num_warps": (4, 8),
        "coarse_num_stages": (2, 3),
        "coarse_resident_blocks": ((2, 3), (1, 2), (3, 4)),
    },
    "select": {"select_threads": (512, 1024)},
    "exact": {"exact_max_registers": (None, 128), "exact_blocks_per_sm": (2, 3, 4, 6)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="131072x1x1024,131072x16x1024,8192x16x512")
    parser.add_argument("--centroids", default="bf16,fp8")
    parser.add_argument("--stages", default="coarse,select,exact")
    arguments = parser.parse_args()
    copy, read = copy_bandwidth() / 1e12, read_bandwidth() / 1e12
    print(f"bandwidth: copy {copy:.2f} TB/s, read {read:.2f} TB/s")
    for shape in arguments.shapes.split(","):
        context, batch, budget = (int(number) for number in shape.split("x"))
        for name in arguments.centroids.split(","):
            tune_shape(context, batch, budget, name, arguments.stages.split(","))


def tune_shape(context: int, batch: int, budget: int, centroids: str, stages: list[str]) -> None:
    geometry = Geometry(8, QWEN3_ROPE_BASE)
    case = with_centroids(make_rows(geometry, context, batch), centroids)
    groups = groups_of_rows(case, batch, budget, geometry.least_bytes(context))
    case, out = groups[0], torch.full_like(groups[0].q, torch.nan)
    share_workspace(groups, budget)
    case.decode(out=out)
    error, different, selected = relative_error(case, out, batch - 1)
    first = out.clone()
    case.decode(out=out)
    print(
        f"\n{context} x {batch}, budget {budget}, {centroids}: error {error:.1e}, {different} of "
        f"{selected} clusters differ, same bits {bool((first == out).all())}, tokens "
        f"{case.workspace.num_selected_tokens.float().mean().item():.0f}"
    )
    for overlap in (True, False):
        share_workspace(groups, budget, {"overlap_launches": overlap})
        times = {name: time_graph(calls).p50_us for name, calls in stage_calls(groups, out).items()}
        print(f"  overlap {overlap}:", " ".join(f"{k} {v:.1f}" for k, v in times.items()))
    for stage in stages:
        results = []
        names = list(CANDIDATES[stage])
        for values in itertools.product(*CANDIDATES[stage].values()):
            overrides = dict(zip(names, values, strict=True))
            try:
                share_workspace(groups, budget, overrides)
                time_us = time_graph(stage_calls(groups, out)[stage], replays=10).p50_us
            except Exception as error:
                print(f"  {stage} {overrides}: {type(error).__name__}")
                continue
            results.append((time_us, overrides))
        results.sort(key=lambda result: result[0])
        for time_us, overrides in results[:5]:
            print(f"  {stage} {time_us:.1f}: {overrides}")
        print(f"  {stage} {results[-1][0]:.1f}: {results[-1][1]} (worst)", flush=True)


if __name__ == "__main__":
    main()
