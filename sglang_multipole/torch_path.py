"""A decode step on a machine without a GPU: snapshot and attention in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from multipole_kernels.decode_buffers import DecodePlan
from multipole_kernels.torch_decode import NUM_COUNTERS, multipole_decode
from sglang_multipole.audit import AuditedRow
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.segment_planner import BatchLimits


class TorchPath:
    """The same steps as TritonPath's, with sizes read on the host."""

    def __init__(
        self,
        pool: ClusterPool,
        layers: Sequence[KVLayer],
        req_to_token: torch.Tensor,
        audit_layer: int | None = None,
    ):
        self.pool, self.layers, self.req_to_token = pool, layers, req_to_token
        self._audit_layer = audit_layer
        # of the audited layer: q, out, the selected slots by row and KV head, sm_scale
        self._audited: tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]], float]
        self.nbytes = 0
        self.limits = BatchLimits()
        self.plan: DecodePlan | None = None
        self._found = torch.zeros(0, 0, dtype=torch.int64)
        self._counters = torch.zeros(0, NUM_COUNTERS, dtype=torch.int64)

    def begin(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_budgets: Sequence[int], step: int
    ) -> None:
        """Find the rows' segments and lay out the step's work.

        Args:
            rows: [B] int64, rows of req_to_token. seq_lens: [B], the new token included.
            token_budgets: B numbers of tokens per KV head.
        """
        config, size = self.pool.config, self.pool.config.segment_size
        seq_lens = seq_lens.long()
        budget = torch.tensor(token_budgets)
        num_segments = -(-int(seq_lens.max()) // size)
        # [B, N * S]; what lies beyond a row's length is never used
        width = min(num_segments * size, self.req_to_token.shape[1])
        slots = self.req_to_token[rows, :width].long()
        slots = torch.nn.functional.pad(slots, (0, num_segments * size - width))
        segment_begin = torch.arange(num_segments) * size
        clustered = torch.tensor([config.clustered_tokens(n, len(rows)) for n in seq_lens.tolist()])
        wanted = (clustered.unsqueeze(-1) - segment_begin).clamp(0, size)
        place, extent = self.pool.find(rows, slots.view(len(rows), num_segments, size), wanted)
        self._found = extent
        self.pool.last_used[place[place > 0]] = step

        # a budget that covers every clustered token makes the row one exact range
        is_sparse = (budget < clustered).unsqueeze(-1)
        place, extent = place * is_sparse, extent * is_sparse
        is_item = place > 0
        position = torch.arange(num_segments * size)
        in_cluster = position < (segment_begin + extent).repeat_interleave(size, dim=-1)
        in_cluster &= position >= config.num_sink_tokens
        is_exact = ~in_cluster & (position < seq_lens.unsqueeze(-1))

        def indptr(counts: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

        self.plan = DecodePlan(
            item_indptr=indptr(is_item.sum(-1)),
            item_place=place[is_item].int(),
            exact_indptr=indptr(is_exact.sum(-1)),
            exact_slots=slots[is_exact].int(),
            token_budget=budget.int(),
        )
        self._counters = torch.zeros(len(rows), NUM_COUNTERS, dtype=torch.int64)

    def attend(self, layer: int, q: torch.Tensor, sm_scale: float, out: torch.Tensor) -> None:
        """Attention of the step's rows in one layer; q, out [B, num_q_heads, head_dim]."""
        kv = self.layers[layer]
        selected_slots = multipole_decode(
            q,
            kv.key_buffer,
            kv.value_buffer,
            self.pool.layer(layer),
            self.plan,
            sm_scale,
            self.pool.config.max_logit_variance,
            out,
            self._counters,
        )
        if layer == self._audit_layer:
            self._audited = (q.clone(), out.clone(), selected_slots, sm_scale)

    def audited(self, index: int, seq_len: int) -> AuditedRow:
        """What the step under way did for its row `index`, which is seq_len tokens long."""
        q, out, selected_slots, sm_scale = self._audited
        begin, end = self.plan.exact_indptr[index : index + 2].tolist()
        selected = selected_slots[index]
        padded = torch.nn.utils.rnn.pad_sequence(selected, batch_first=True)
        sizes = torch.tensor([[len(slots)] for slots in selected])
        return AuditedRow(
            q[index],
            out[index],
            self.plan.exact_slots[begin:end],
            torch.ones(end - begin, dtype=torch.bool),
            padded,
            torch.arange(padded.shape[1]) < sizes,
            sm_scale,
        )

    def results(self, num_rows: int) -> TorchResults:
        """The step's results, for the first num_rows rows."""
        return TorchResults(self._found, self._counters, self.pool.last_used.clone())


class TorchResults:
    """A step's results: found [B][N] tokens, counters [B][4], last_used [P] steps."""

    def __init__(self, found: torch.Tensor, counters: torch.Tensor, last_used: torch.Tensor):
        self._tensors = (found, counters, last_used)

    def read(self) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
        found, counters, last_used = self._tensors
        return found.numpy(), counters.tolist(), last_used.numpy()
