"""What a decode step on a GPU is laid out in, made once for the largest batch.

The same class on the meta device says what the buffers will cost before there is memory for them.
"""

from __future__ import annotations

import dataclasses

import torch

from multipole_kernels.decode_buffers import DecodeWorkspace
from multipole_kernels.launch_config import launch_config
from multipole_kernels.segment_snapshot import SegmentSnapshot
from multipole_kernels.torch_decode import NUM_COUNTERS
from sglang_multipole.audit import AuditBuffers
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.segment_planner import BatchLimits

# forks share KV slots, so a batch can have more tokens than the KV pool; so many times as many are
# attended with clusters
MAX_SHARING = 16


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What the buffers' sizes follow from.

    max_rows: rows of the largest batch, padding included. max_context: tokens of the longest row.
    num_slots: tokens that the KV pool holds.
    """

    max_rows: int
    max_context: int
    num_slots: int
    num_kv_heads: int
    gqa_group_size: int
    head_dim: int


class StepBuffers:
    """Snapshot, kernel workspace and counters; what the audit keeps, if there is one.

    Args:
        device: of the buffers; "meta" allocates nothing.
        card: the GPU whose launch configuration sizes the workspace.
    """

    def __init__(
        self,
        config: MultipoleConfig,
        shape: StepShape,
        device: torch.device | str,
        card: torch.device | str,
    ):
        device = torch.device(device)
        max_segments = -(-shape.max_context // config.segment_size)
        max_tokens = min(shape.max_rows * shape.max_context, MAX_SHARING * shape.num_slots)
        # each row rounds its segments up
        max_items = min(
            shape.max_rows * max_segments, max_tokens // config.segment_size + shape.max_rows
        )
        self.limits = BatchLimits(shape.max_rows, max_tokens)
        self.snapshot = SegmentSnapshot(
            shape.max_rows, max_segments, max_items, max_tokens + shape.max_rows, device
        )
        self.workspace = DecodeWorkspace(
            shape.max_rows,
            max_items,
            max_segments,
            # beyond the context a budget changes nothing
            min(config.token_budget_limit, shape.max_context),
            shape.num_kv_heads,
            shape.gqa_group_size,
            shape.head_dim,
            config.clusters_per_segment,
            config.max_cluster_size,
            device,
            launch_config(torch.device(card)),
        )
        self.counters = torch.zeros(shape.max_rows, NUM_COUNTERS, dtype=torch.int64, device=device)
        self.audit: AuditBuffers | None = None
        if config.audit_interval:
            self.audit = AuditBuffers(shape.max_rows, self.workspace)

    @property
    def nbytes(self) -> int:
        """Device memory, in bytes."""
        audit = self.audit.nbytes if self.audit is not None else 0
        return self.snapshot.nbytes + self.workspace.bytes + self.counters.nbytes + audit
