"""Decode graphs in two kinds: with clusters, and SGLang's dense attention.

Which one a step replays is decided by the backend from token counts (SegmentPlanner.num_clustered),
so that tensor-parallel ranks replay the same kind. Both kinds share SGLang's graph memory pool and
input buffers: they never run at the same time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from sglang_multipole import sglang_compat
from sglang_multipole.attach import runtime_of

SPARSE, DENSE = "sparse", "dense"


@dataclasses.dataclass
class GraphUsage:
    """What the graphs of one kind took: capture time, and device memory reserved meanwhile.

    The kinds share a memory pool, so the kind captured first pays for what both use.
    """

    graphs: int = 0
    seconds: float = 0.0
    bytes: int = 0


class MultipoleDecodeGraphRunner(DecodeCudaGraphRunner):
    """SGLang's decode graphs, each batch size captured once with clusters and once without."""

    def __init__(self, model_runner: Any, **keywords: Any):
        self._multipole = sglang_compat.decode_backend(model_runner)
        self._usage = {SPARSE: GraphUsage(), DENSE: GraphUsage()}
        # captures
        super().__init__(model_runner, **keywords)
        runtime_of(model_runner).graphs = self._usage

    def capture_one_shape(
        self,
        size: int,
        forward: Callable[..., Any],
        stream_idx: int | None = None,
        variant_label: str | None = None,
    ) -> None:
        for kind in (DENSE, SPARSE):
            began, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
            self._multipole.is_sparse = kind == SPARSE
            super().capture_one_shape(size, forward, stream_idx, variant_label)
            usage = self._usage[kind]
            usage.graphs += 1
            usage.seconds += time.perf_counter() - began
            usage.bytes += free - torch.cuda.mem_get_info()[0]

    def _make_graph_key(
        self, size: int, stream_idx: int | None = None, variant_label: str | None = None
    ) -> ShapeKey:
        # asked for when the backend has decided on the kind: at capture, and after a replay's
        # metadata; before them (can_run_graph) either kind is there
        kind = SPARSE if self._multipole.is_sparse else DENSE
        label = kind if variant_label is None else f"{variant_label} {kind}"
        return super()._make_graph_key(size, stream_idx, label)
