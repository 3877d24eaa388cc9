"""Time work on the GPU: replays of CUDA graphs in which calls over different inputs alternate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

# of a graph, beside which its start does not show
_LEAST_CALLS = 16


@dataclasses.dataclass
class Quantiles:
    p20_us: float
    p50_us: float
    p80_us: float


def time_graph(
    calls: list[Callable[[], object]],
    replays: int = 20,
    repeats: int | None = None,
    between: Callable[[], object] | None = None,
) -> Quantiles:
    """Microseconds of one call, the calls replayed one after another in a CUDA graph.

    repeats: how often a graph goes through the calls; by default until it has _LEAST_CALLS.
    between: runs before each call; the median of a graph of as many of it alone is subtracted.
    """
    repeats = repeats or -(-_LEAST_CALLS // len(calls))
    if between is not None:
        alone = time_graph([between] * len(calls), replays, repeats).p50_us
        both = time_graph(
            [lambda call=call: (between(), call()) for call in calls], replays, repeats
        )
        return Quantiles(both.p20_us - alone, both.p50_us - alone, both.p80_us - alone)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)
    per_call = [time / (repeats * len(calls)) for time in times]
    return Quantiles(*(per_call[int(len(per_call) * share)] for share in (0.2, 0.5, 0.8)))


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = time_graph([lambda: target.copy_(source)], replays=10, repeats=2).p50_us * 1e-6
    return 2 * source.nbytes / seconds


def read_bandwidth() -> float:
    """Bytes per second of a sum over a large tensor: nothing is written."""
    source = torch.ones(1 << 29, dtype=torch.float32, device="cuda")
    seconds = time_graph([lambda: source.sum()], replays=10, repeats=2).p50_us * 1e-6
    return source.nbytes / seconds
