"""Decode attention on one GPU: multipole against dense decode and against the paper's claim.

    python -m benchmarks.decode_attention --csv decode_attention.csv [--commit HASH]
        [--points targets,short-segments,...] [--captured keys.pt] [--seconds 200]
        [--between nothing,weights]

Per point the output is checked first, against the float32 reference and for the same bits twice;
then a layer's step is timed, and each of its three launches alone, in CUDA-graph replays over rows
of a large pool, so that each step finds L2 cold (benchmarks/decode_inputs.py). The snapshot and the
plan, once a step, count as 1 / NUM_LAYERS. Keys are a mixture with position structure
(tests/decode_keys.py), or captured from a model (benchmarks/captured_keys.py), and really
clustered; slots lie in no order. Segments, clusters and buffers are as a server has them by
default. Rows below the server's default gate are attended with clusters all the same.

Column between: nothing, where steps follow each other and find their code in the caches; weights,
where before each step a layer's weights are read, as in a server (benchmarks/layer_weights.py), and
that work's own time, measured the same way, is subtracted (at the batches that decode_points.py
names for it). The step's q, which a server has just written, is cold too. Launches are not timed
alone there.

A step that takes one launch (column launches; see launch_config.py) is timed as such, beside the
step in three launches (three_launches_us), which a server takes whose longest context is longer,
and each of the three alone. Columns: bytes are what must be read and written once (centroids,
selected and always-exact tokens, weights written and read); share_of_copy and share_of_read are
their rate over the card's measured copy and read bandwidth. sum_of_launches_us is the paper's
measure: each launch alone, nothing overlapped. selected_sizes counts the first group's selected
clusters of up to SIZE_EDGES tokens. exact_flashinfer_us, with int8 centroids, is FlashInfer's paged
decode over the selected tokens alone, each (row, KV head) as a request of its own: what the exact
launch would take if it had nothing else to do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import triton

from benchmarks.decode_inputs import (
    Geometry,
    bytes_moved,
    groups_of_rows,
    make_rows,
    with_centroids,
)
from benchmarks.decode_points import POINT_SETS, Points
from benchmarks.decode_stages import relative_error, selected_sizes, share_workspace, stage_calls
from benchmarks.dense_baselines import flashinfer_version, time_dense, time_selected
from benchmarks.layer_weights import LayerWeights
from benchmarks.step_work import time_snapshot
from benchmarks.timing import Quantiles, copy_bandwidth, read_bandwidth, time_graph
from benchmarks.versions import commit_of_rows
from multipole_kernels.decode_plan import plan_chunks
from tests.decode_case import DecodeCase

NUM_LAYERS = 36
MAX_RELATIVE_ERROR = 6e-3  # bfloat16 against float32
# clusters that rank alike to the rounding of their float16 weights may be taken either way
MAX_DIFFERENT = 0.02
SIZE_EDGES = (4, 8, 16, 32, 64, 128)
MAX_TOKEN_BUDGET = 4096  # what the buffers are made for, if no budget is larger
MIN_CONTEXT = 4096  # the server's gate
BETWEEN = ("nothing", "weights")  # of two steps


class Table:
    """The rows measured so far, in a CSV file that is whole after each of them."""

    def __init__(self, path: str, environment: dict[str, object]):
        self._path, self._environment = path, environment
        self.rows: list[dict[str, object]] = []

    def add(self, quantiles: Quantiles, moved: int, **columns: object) -> dict[str, object]:
        rate = moved / (quantiles.p50_us * 1e-6)
        row = self._environment | columns | dataclasses.asdict(quantiles)
        row["bytes"], row["gb_per_s"] = moved, rate / 1e9
        for kind in ("copy", "read"):
            row[f"share_of_{kind}"] = rate / self._environment[f"{kind}_bytes_per_s"]
        self.rows.append({name: _short(value) for name, value in row.items()})
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(self._path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        return row


def _short(value: object) -> object:
    """Five digits say more than is known."""
    return f"{value:.5g}" if isinstance(value, float) else value


def bench_points(points: Points, table: Table, options: argparse.Namespace) -> bool:
    """Measure all points over one pool of rows; False if a result was wrong."""
    geometry = Geometry(points.num_kv_heads, points.rope_base)
    captured = options.captured if points.keys == "captured" else None
    base = make_rows(geometry, points.context, max(points.batches), captured)
    torch.cuda.synchronize()
    print(
        f"\n{points.context} tokens, {points.num_kv_heads} KV heads, {points.keys}, "
        f"segments of {geometry.segment_size}: "
        f"{len(base.rows)} rows [{time.perf_counter() - options.started:.0f} s]",
        flush=True,
    )
    labels = {
        "keys": points.keys,
        "context": points.context,
        "num_kv_heads": points.num_kv_heads,
        "segment_size": geometry.segment_size,
    }
    kv_bytes = 2 * points.context * geometry.num_kv_heads * geometry.head_dim * 2
    between = between_steps(points, options.between)
    dense, snapshots = {}, {}
    for batch in points.batches:
        groups = groups_of_rows(base, batch, 0, kv_bytes)
        snapshots[batch] = time_snapshot(groups[0], min(MIN_CONTEXT, points.context // 2))
        providers = [
            name for name in options.dense if name == "flashinfer" or batch in points.triton_batches
        ]
        for name, work in between[batch].items():
            dense[name, batch] = time_dense(groups, providers, work)
            for provider, (quantiles, error) in dense[name, batch].items():
                columns = labels | {"between": name, "batch": batch, "relative_error": error}
                table.add(quantiles, batch * kv_bytes, provider=provider, **columns)
                print(
                    f"  x {batch:2d} {provider:22s} {quantiles.p50_us:8.1f} us, error {error:.1e}, "
                    f"between: {name}"
                )
    right = True
    for name in options.centroids:
        case = with_centroids(base, name)
        for batch in points.batches:
            for budget in points.budget_tokens(name):
                groups = groups_of_rows(case, batch, budget, geometry.least_bytes(points.context))
                columns = labels | {"batch": batch, "centroids": name, "budget": budget}
                for kind, work in between[batch].items():
                    right &= bench_point(
                        groups,
                        columns | {"between": kind},
                        dense[kind, batch],
                        snapshots[batch],
                        table,
                        work,
                    )
    return right


def between_steps(
    points: Points, kinds: list[str]
) -> dict[int, dict[str, Callable[[], None] | None]]:
    """batch -> kind of --between measured at it -> what runs before each step."""
    weights = LayerWeights() if "weights" in kinds and points.weights_batches else None
    return {
        batch: {
            kind: None if kind == "nothing" else weights.products(batch)
            for kind in kinds
            if kind == "nothing" or batch in points.weights_batches
        }
        for batch in points.batches
    }


def bench_point(
    groups: list[DecodeCase],
    columns: dict[str, object],
    dense: dict[str, tuple[Quantiles, float]],
    snapshot: Quantiles,
    table: Table,
    between: Callable[[], None] | None,
) -> bool:
    """Measure one batch size, budget and kind of centroids; False if its result was wrong."""
    case, batch, budget = groups[0], columns["batch"], columns["budget"]
    share_workspace(groups, max(MAX_TOKEN_BUDGET, budget))
    out = torch.full_like(case.q, torch.nan)
    calls = stage_calls(groups, out)
    calls["all"][0]()
    first = out.clone()
    calls["all"][0]()
    same_bits = torch.equal(first, out)
    error, different, expected = relative_error(case, out)
    title = f"  x {batch:2d} {columns['centroids']:5s} budget {budget:6d}"
    may_differ = math.ceil(MAX_DIFFERENT * expected)
    if not (error <= MAX_RELATIVE_ERROR and different <= may_differ and same_bits):
        print(
            f"{title} WRONG: error {error:.1e}, {different} of {expected} clusters differ, "
            f"the same bits twice: {same_bits}"
        )
        return False
    columns |= {
        "groups": len(groups),
        "relative_error": error,
        "clusters_selected_differently": different,
        "mean_selected_tokens": case.workspace.num_selected_tokens.float().mean().item(),
        "selected_sizes": " ".join(map(str, selected_sizes(case, SIZE_EDGES))),
    }
    moved = bytes_moved(case)
    timed = calls if between is None else ("all", "three")
    stages = {stage: time_graph(calls[stage], between=between) for stage in timed}
    element_size = case.pool_layer.key_centroids.element_size()
    plan = time_graph([lambda: plan_chunks(case.plan, case.workspace, batch, element_size)])
    add_us = (plan.p50_us + snapshot.p50_us) / NUM_LAYERS
    whole, three = stages.pop("all"), stages.pop("three")
    total = Quantiles(whole.p20_us + add_us, whole.p50_us + add_us, whole.p80_us + add_us)
    columns["launches"] = 3 if case.workspace.team(batch) is None else 1
    columns["three_launches_us"] = three.p50_us + add_us
    columns |= {"plan_us": plan.p50_us, "snapshot_us": snapshot.p50_us}
    columns |= {f"{stage}_us": times.p50_us for stage, times in stages.items()}
    if stages:
        columns["sum_of_launches_us"] = sum(times.p50_us for times in stages.values())
    for provider, (quantiles, _) in dense.items():
        columns[f"ratio_to_{provider}"] = quantiles.p50_us / total.p50_us
    if "flashinfer" in dense and budget >= 1024 and columns["centroids"] == "int8" and stages:
        columns["exact_flashinfer_us"] = time_selected(groups, out)
    row = table.add(total, moved, provider="multipole", **columns)
    print(
        f"{title} {total.p50_us:8.1f} us in {row['launches']}, between: {row['between']}; "
        f"three {row['three_launches_us']:.1f}; "
        + "".join(f"{stage} {times.p50_us:.1f}; " for stage, times in stages.items())
        + f"x{row.get('ratio_to_flashinfer', 0):.2f}, {row['share_of_copy']:.0%} of copy; error "
        f"{error:.1e}; sizes {row['selected_sizes']}",
        flush=True,
    )
    return True


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", default="decode_attention.csv")
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--points", default="targets,more,four-heads,short-segments")
    parser.add_argument("--contexts", default="", help="only these, comma separated")
    parser.add_argument("--captured", help="a file of benchmarks.capture_keys")
    parser.add_argument("--centroids", default="bf16,int8,fp8")
    parser.add_argument("--between", default="nothing", help="nothing, weights or both")
    parser.add_argument("--dense", default="flashinfer,sglang-triton,triton-dense")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after these")
    options = parser.parse_args()
    options.started = time.perf_counter()
    options.centroids = options.centroids.split(",")
    options.between = options.between.split(",")
    if unknown := set(options.between) - set(BETWEEN):
        parser.error(f"--between is of {BETWEEN}, got {sorted(unknown)}")
    options.dense = [name for name in options.dense.split(",") if name]
    contexts = {int(context) for context in options.contexts.split(",") if context}
    chosen = [points for name in options.points.split(",") for points in POINT_SETS[name]]
    if options.captured is None and any(points.keys == "captured" for points in chosen):
        parser.error("the points named captured need --captured")
    environment = {
        "commit": commit_of_rows(options.commit),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver_version(),
        "flashinfer": flashinfer_version(options.dense),
        "copy_bytes_per_s": copy_bandwidth(),
        "read_bytes_per_s": read_bandwidth(),
    }
    print(environment, flush=True)
    table = Table(options.csv, environment)
    right = True
    for points in chosen:
        if contexts and points.context not in contexts:
            continue
        if time.perf_counter() - options.started > options.seconds:
            print(f"not measured for want of time: {points}")
            continue
        right &= bench_points(points, table, options)
        torch.cuda.empty_cache()
    if not right:
        sys.exit("a result was wrong and was not timed")


if __name__ == "__main__":
    main()
