"""Time work on the GPU: CUDA-graph replays over several layers' inputs, so that L2 is cold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch

from multipole_kernels.decode_buffers import PoolLayer
from tests.decode_case import DecodeCase

# a layer's inputs are repeated until a replay touches this many times the L2 cache
L2_TIMES = 3


def copies_for_cold_l2(bytes_touched: int) -> int:
    """How many layers' inputs a graph must go through to find each of them out of L2."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(16, -(-L2_TIMES * l2_bytes // bytes_touched)))


def copy_layer(case: DecodeCase) -> DecodeCase:
    """The case as another layer would see it: its own KV and centroids, the same plan."""
    layer = copy.copy(case)
    layer.k_cache, layer.v_cache = case.k_cache.clone(), case.v_cache.clone()
    tensors = {
        name: None if tensor is None else tensor.clone()
        for name, tensor in vars(case.pool_layer).items()
    }
    layer.pool_layer = PoolLayer(**tensors)
    return layer


@dataclasses.dataclass
class Quantiles:
    p20_us: float
    p50_us: float
    p80_us: float


def time_graph(calls: list[Callable[[], object]], replays: int = 40, repeats: int = 4) -> Quantiles:
    """Microseconds of one call, the calls replayed one after another in a CUDA graph."""
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
