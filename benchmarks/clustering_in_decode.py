"""What updates of open segments do to the time between decode steps, by when they are launched.

    python -m benchmarks.clustering_in_decode --csv clustering_in_decode.csv [--commit HASH]

A batch of equally long rows decodes in replays of one graph: 36 layers, each the products with
Qwen3-8B's weights and a step of multipole attention. Every row's open segment is clustered anew
once in 128 steps, all with the same deadline, as when requests began together. Ways:

    none          no updates
    at-deadline   all of them before the step that needs them
    one-a-step    one whole update before a step, until all are done
    slices        slices of updates before each step, as the server does them (EarlyBuilds)
    beside-N      on a stream beside the decode steps, N layers at a time; -low: of lower priority

Columns are milliseconds of the device between the ends of two steps, without the first interval;
host_ms is what the launches of updates keep the host busy, a step in the mean; slice_ms is the time
of each of a segment's slices alone. Before a way is timed, the clusters that it makes are compared,
bit by bit, with those of one clustering at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.clustering import Bench, Order, make_bench
from benchmarks.csv_file import write_rows
from benchmarks.decode_inputs import Geometry, groups_of_rows, make_rows, with_centroids
from benchmarks.decode_stages import share_workspace, stage_calls
from benchmarks.layer_weights import LayerWeights
from benchmarks.versions import commit_of_rows
from multipole_kernels.clustering_batch import make_orders
from sglang_multipole.early_builds import EarlyBuilds
from sglang_multipole.segment_builder import BuildOrder

NUM_LAYERS = 36
INTERVAL = 128  # steps between two updates of a row
BUDGET = 512
MAX_TOKEN_BUDGET = 4096
# a server's host has one step queued while another runs
STEPS_AHEAD = 2

Update = Callable[[int], None]  # launches what belongs before the step of this number


def make_step(batch: int, context: int) -> Callable[[], None]:
    """A decode step of batch rows, replayed; whatever the graph reads lives as long."""
    geometry = Geometry(num_kv_heads=8, rope_base=1e6)
    case = with_centroids(make_rows(geometry, context, batch), "int8")
    groups = groups_of_rows(case, batch, BUDGET, geometry.least_bytes(context))
    share_workspace(groups, MAX_TOKEN_BUDGET)
    attend = stage_calls(groups, torch.empty_like(groups[0].q))["all"]
    multiply = LayerWeights().products(batch)

    def launch() -> None:
        for layer in range(NUM_LAYERS):
            multiply()
            attend[layer % len(attend)]()

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()

    def replay(held: object = launch) -> None:
        graph.replay()

    return replay


def at_deadline(bench: Bench, orders: list[Order]) -> Update:
    def update(step: int) -> None:
        if step % INTERVAL == 0:
            bench.kernels.cluster(orders)

    return update


def one_a_step(bench: Bench, orders: list[Order]) -> Update:
    def update(step: int) -> None:
        if step % INTERVAL < len(orders):
            bench.kernels.cluster([orders[step % INTERVAL]])

    return update


def in_slices(bench: Bench, orders: list[Order]) -> Update:
    early = EarlyBuilds(bench.kernels.num_slices())
    running: dict[BuildOrder, Iterator[None]] = {}
    places: Iterator[int] = iter(())

    def update(step: int) -> None:
        nonlocal places
        if step % INTERVAL == 0:
            running.clear()
            places = iter([order[3] for order in orders])
            for nth, (row, segment, extent, _) in enumerate(orders):
                early.claim(str(nth), segment, extent)
                early.expect(str(nth), row, segment, extent, step + INTERVAL - 1)
        for order, count in early.slices(step, lambda: next(places)):
            if order not in running:
                running[order] = bench.kernels.slices(dataclasses.astuple(order))
            for _ in range(count):
                next(running[order])

    return update


def beside(bench: Bench, orders: list[Order], layers_at_once: int, priority: int) -> Update:
    """An update is begun every INTERVAL / orders steps, and waited for as many steps later."""
    stream = torch.cuda.Stream(priority=priority)
    done = torch.cuda.Event()
    kernels = bench.kernels
    apart = INTERVAL // len(orders)

    def update(step: int) -> None:
        if step % apart:
            return
        order = orders[step % INTERVAL // apart]
        torch.cuda.current_stream().wait_event(done)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block = kernels.geometry.block_clusters(order[2], order[1])
            table = make_orders([order], "cuda")
            for first in range(0, NUM_LAYERS, layers_at_once):
                layers = range(first, min(first + layers_at_once, NUM_LAYERS))
                kernels._cluster_chunk(table, layers, block)
            done.record(stream)

    return update


def ways(bench: Bench, orders: list[Order]) -> dict[str, Update]:
    return {
        "slices": in_slices(bench, orders),
        "beside-3-low": beside(bench, orders, 3, 0),
        "at-deadline": at_deadline(bench, orders),
        "none": lambda step: None,
        "one-a-step": one_a_step(bench, orders),
        "beside-3": beside(bench, orders, 3, -1),
        "beside-1-low": beside(bench, orders, 1, 0),
        "beside-12-low": beside(bench, orders, 12, 0),
    }


def step_times(
    decode: Callable[[], None], update: Update, stream: torch.cuda.Stream, num_steps: int
) -> tuple[list[float], float]:
    """Milliseconds between the ends of steps, of num_steps after an interval that is not timed.

    Also the milliseconds that a step's updates keep the host busy, in the mean.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(INTERVAL + num_steps)]
    host = 0.0
    with torch.cuda.stream(stream):
        for step, event in enumerate(events):
            begin = time.perf_counter()
            update(step)
            host += (time.perf_counter() - begin) * (step >= INTERVAL)
            decode()
            event.record()
            if step >= STEPS_AHEAD:
                events[step - STEPS_AHEAD].synchronize()
    torch.cuda.synchronize()
    timed = events[INTERVAL - 1 :]
    times = [one.elapsed_time(other) for one, other in zip(timed, timed[1:], strict=False)]
    return times, host * 1e3 / num_steps


def slice_times(bench: Bench, order: Order) -> list[float]:
    """Milliseconds of each of an order's slices alone, the middle of five."""
    rounds = []
    for _ in range(5):
        slices = bench.kernels.slices(order)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(bench.kernels.num_slices())]
        # all are queued before the first runs, or the host's time would be measured
        torch.cuda._sleep(20_000_000)
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        for event, _ in zip(events, slices, strict=True):
            event.record()
        torch.cuda.synchronize()
        marks = [begin, *events]
        rounds.append([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)])
    return [sorted(times)[2] for times in zip(*rounds, strict=True)]


def payload(bench: Bench, orders: list[Order]) -> dict[str, torch.Tensor]:
    """What is read of the orders' places."""
    places = [order[3] for order in orders]
    extent, clusters = orders[0][2], -(-orders[0][2] // bench.config.tokens_per_cluster)
    used = {"members": extent, "pair_weight": None}
    return {
        name: tensor[:, places][..., : used[name]].clone()
        if name in used
        else tensor[:, places][:, :, :, :clusters].clone()
        for name, tensor in vars(bench.kernels.pool).items()
        if tensor is not None
    }


def differs(bench: Bench, orders: list[Order], update: Update, expected: dict) -> str:
    """The first part of the payload that the way gets wrong, or nothing."""
    places = torch.tensor([order[3] for order in orders], device="cuda")
    for tensor in vars(bench.kernels.pool).values():
        if tensor is not None:
            tensor[:, places] = 0
    for step in range(INTERVAL):
        update(step)
    torch.cuda.synchronize()
    actual = payload(bench, orders)
    return next((name for name in expected if not torch.equal(actual[name], expected[name])), "")


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=Path("clustering_in_decode.csv"))
    parser.add_argument("--commit", default="", help="where there is no git repository")
    parser.add_argument("--context", type=int, default=32768, help="tokens of each row")
    parser.add_argument("--batches", default="8,1", help="rows of a step")
    parser.add_argument("--extents", default="3584,2048,1024", help="tokens of the open segments")
    parser.add_argument("--intervals", type=int, default=2, help="timed, of 128 steps each")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after these")
    options = parser.parse_args()
    started = time.perf_counter()
    environment = {
        "commit": commit_of_rows(options.commit),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "context": options.context,
    }
    print(environment, flush=True)
    bench = make_bench(4096)
    # above the one beside it
    stream = torch.cuda.Stream(priority=-1)
    rows: list[dict[str, Any]] = []
    is_right = True
    for batch in map(int, options.batches.split(",")):
        decode = make_step(batch, options.context)
        print(f"batch {batch} captured [{time.perf_counter() - started:.0f} s]", flush=True)
        for extent in map(int, options.extents.split(",")):
            num_rows = len(bench.case.req_to_token)
            orders = [
                (nth % num_rows, 1 + nth // num_rows, extent, 1 + nth) for nth in range(batch)
            ]
            bench.kernels.cluster(orders)
            expected = payload(bench, orders)
            slices = slice_times(bench, orders[0])
            for way, update in ways(bench, orders).items():
                if time.perf_counter() - started > options.seconds:
                    print(f"not measured for want of time: batch {batch}, {extent}, {way}")
                    continue
                wrong = differs(bench, orders, update, expected) if way != "none" else ""
                if wrong:
                    print(f"  {way}: {wrong} differs; not timed")
                    is_right = False
                    continue
                times, host_ms = step_times(decode, update, stream, options.intervals * INTERVAL)
                row: dict[str, Any] = {"batch": batch, "extent": extent, "way": way}
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
                    row[f"{name}_ms"] = round(quantile(times, share), 4)
                row["mean_ms"] = round(sum(times) / len(times), 4)
                row["host_ms"] = round(host_ms, 4)
                row["slice_ms"] = " ".join(f"{ms:.3f}" for ms in slices) if way == "slices" else ""
                rows.append(environment | row)
                write_rows(options.csv, rows)
                print("  " + " ".join(f"{v}" for v in row.values()), flush=True)
        del decode
        torch.cuda.empty_cache()
    if not is_right:
        sys.exit("a result was wrong and was not timed")


if __name__ == "__main__":
    main()
