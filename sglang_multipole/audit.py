"""The audit: every so many decode steps, one row of one layer is also attended to densely.

What is compared is what the server really computed: the path keeps the audited layer's queries,
outputs and selected tokens, and the dense answer is computed from the KV pool behind the forward,
on its stream. Nothing here waits for the device; the two numbers travel with the step's results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace
from multipole_kernels.torch_decode import SPARSE_STEPS
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.segment_planner import DecodeRow, StepPlan

# tokens whose keys and values are in float32 at a time; at 8 KV heads of 128 they take 64 MiB
CHUNK_TOKENS = 8192
# audits that may be on their way to the host at a time; SGLang has two steps in flight
_RING = 4


@dataclasses.dataclass(frozen=True)
class AuditedRow:
    """What a step did for one row in the audited layer, on the device.

    q, out: [H * G, D]. exact_slots: [E] KV slots that every KV head attended to, where is_exact [E]
    is true. selected_slots: [H, C] slots of the selected clusters' tokens, where is_selected
    [H, C] is true.
    """

    q: torch.Tensor
    out: torch.Tensor
    exact_slots: torch.Tensor
    is_exact: torch.Tensor
    selected_slots: torch.Tensor
    is_selected: torch.Tensor
    sm_scale: float


class AuditBuffers:
    """Where a captured graph leaves what it did in the audited layer.

    Args:
        workspace: the kernels'; the copies are made beside it, on its device.
    """

    def __init__(self, max_rows: int, workspace: DecodeWorkspace):
        num_q_heads = workspace.num_kv_heads * workspace.gqa_group_size
        shape = (max_rows, num_q_heads, workspace.head_dim)
        device = workspace.selected_slots.device
        self.q, self.out = (torch.zeros(shape, device=device) for _ in range(2))
        self.selected_slots = torch.zeros_like(workspace.selected_slots)
        self.num_selected_tokens = torch.zeros_like(workspace.num_selected_tokens)
        self.sm_scale = 1.0

    @property
    def nbytes(self) -> int:
        tensors = (self.q, self.out, self.selected_slots, self.num_selected_tokens)
        return sum(tensor.nbytes for tensor in tensors)

    def keep(
        self, q: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace, sm_scale: float
    ) -> None:
        """Copy the layer's queries, outputs and selections; four copies in the graph."""
        n, self.sm_scale = q.shape[0], sm_scale
        self.q[:n].copy_(q)
        self.out[:n].copy_(out)
        self.selected_slots[:n].copy_(workspace.selected_slots[:n])
        self.num_selected_tokens[:n].copy_(workspace.num_selected_tokens[:n])

    def row(self, plan: DecodePlan, index: int, seq_len: int) -> AuditedRow:
        """The row's part; plan is the step's, seq_len tokens bound its exact ones."""
        device = self.q.device
        exact = plan.exact_indptr[index] + torch.arange(seq_len, device=device)
        selected = torch.arange(self.selected_slots.shape[-1], device=device)
        return AuditedRow(
            self.q[index],
            self.out[index],
            plan.exact_slots[exact.clamp(max=plan.exact_slots.shape[0] - 1)],
            exact < plan.exact_indptr[index + 1],
            self.selected_slots[index],
            selected < self.num_selected_tokens[index].unsqueeze(-1),
            self.sm_scale,
        )


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """One audited row of one step, mean over this rank's heads.

    relative_error: |out - dense| / |dense|. mass_covered: share of the dense softmax's probability
    on tokens that were attended exactly, 0 to 1.
    """

    rid: str
    layer: int
    context_tokens: int
    relative_error: float
    mass_covered: float


@dataclasses.dataclass
class AuditTotals:
    """Sums over all audits."""

    audits: int = 0
    relative_error: float = 0.0
    largest_relative_error: float = 0.0
    mass_covered: float = 0.0

    def add(self, result: AuditResult) -> None:
        self.audits += 1
        self.relative_error += result.relative_error
        self.largest_relative_error = max(self.largest_relative_error, result.relative_error)
        self.mass_covered += result.mass_covered


@dataclasses.dataclass(frozen=True)
class PendingAudit:
    """An audit on its way to the host."""

    index: int  # of the row in its step's plan
    row: DecodeRow
    layer: int
    numbers: torch.Tensor  # [2] float32, pinned

    def result(self, counters: Sequence[Sequence[int]], num_layers: int) -> AuditResult | None:
        """The numbers, once the step's results have arrived; None if the row was not sparse."""
        if counters[self.index][SPARSE_STEPS] != num_layers:
            return None
        error, mass = self.numbers.tolist()
        return AuditResult(self.row.rid, self.layer, self.row.seq_len, error, mass)


class Audit:
    """Chooses rows, and computes their dense attention.

    Args:
        layer: the audited one, from 0; kv is its part of the KV pool.
        req_to_token: [rows, context] int32, SGLang's map from positions to KV slots.
    """

    def __init__(
        self, config: MultipoleConfig, layer: int, kv: KVLayer, req_to_token: torch.Tensor
    ):
        self.layer = layer
        self.totals = AuditTotals()
        self._config = config
        self._kv, self._req_to_token = kv, req_to_token
        has_gpu = req_to_token.device.type == "cuda"
        self._numbers = [torch.zeros(2, pin_memory=has_gpu) for _ in range(_RING)]
        self._num_begun = 0
        self._index: int | None = None
        self._slots = req_to_token.new_zeros(0)

    def begin(self, plan: StepPlan) -> None:
        """Choose a row of a step with sparse rows, if it is to be audited; before the forward.

        The row's slots are copied on the forward's stream: by the time the forward has run,
        SGLang may have given the row to another request.
        """
        self._index = None
        if plan.step % self._config.audit_interval:
            return
        num_rows = len(plan.rows)
        candidates = [
            i
            for i, row in enumerate(plan.rows)
            if row.token_budget < self._config.clustered_tokens(row.seq_len, num_rows)
        ]
        if not candidates:
            return
        self._num_begun += 1
        self._index = candidates[self._num_begun % len(candidates)]
        row = plan.rows[self._index]
        self._slots = self._req_to_token[row.row, : row.seq_len].long()

    @property
    def index(self) -> int | None:
        """Of the row in the plan of the step under way; None when the step is not audited."""
        return self._index

    def end(self, plan: StepPlan, audited: AuditedRow) -> PendingAudit:
        """Compute the dense answer behind the forward, and send the numbers to the host."""
        numbers = self._numbers[self._num_begun % _RING]
        numbers.copy_(compare(audited, self._kv, self._slots), non_blocking=True)
        index, self._index = self._index, None
        return PendingAudit(index, plan.rows[index], self.layer, numbers)


def compare(audited: AuditedRow, kv: KVLayer, slots: torch.Tensor) -> torch.Tensor:
    """[2] float32: relative_error and mass_covered of AuditResult.

    Args:
        slots: [T] int64, KV slots of all of the row's tokens.
    """
    num_kv_heads, head_dim = kv.key_buffer.shape[1:]
    q = audited.q.float().view(num_kv_heads, -1, head_dim) * audited.sm_scale
    out, lse = _attend(q, kv, slots)
    dense = out.flatten()
    error = (audited.out.float().flatten() - dense).norm() / dense.norm()
    exact = _lse_of(q, kv, audited.exact_slots, audited.is_exact)
    keys = kv.key_buffer[
        audited.selected_slots.long(), torch.arange(num_kv_heads, device=q.device)[:, None]
    ]
    scores = q @ keys.float().mT
    selected = scores.masked_fill(~audited.is_selected.unsqueeze(1), float("-inf")).logsumexp(-1)
    mass = (torch.logaddexp(exact, selected) - lse).exp().mean()
    return torch.stack([error, mass])


def _attend(q: torch.Tensor, kv: KVLayer, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of q [H, G, D], scaled: out [H, G, D] and lse [H, G], float32."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for chunk in slots.split(CHUNK_TOKENS):
        scores = q @ kv.key_buffer[chunk].float().permute(1, 2, 0)
        chunk_lse = scores.logsumexp(-1)
        values = kv.value_buffer[chunk].transpose(0, 1).float()
        chunk_out = (scores - chunk_lse.unsqueeze(-1)).exp() @ values
        both = torch.logaddexp(lse, chunk_lse)
        out = out * (lse - both).exp().unsqueeze(-1)
        out += chunk_out * (chunk_lse - both).exp().unsqueeze(-1)
        lse = both
    return out, lse


def _lse_of(
    q: torch.Tensor, kv: KVLayer, slots: torch.Tensor, is_used: torch.Tensor
) -> torch.Tensor:
    """[H, G] log-sum-exp of the scores of the slots [E] that are used."""
    lse = q.new_full(q.shape[:-1], float("-inf"))
    for chunk, used in zip(slots.split(CHUNK_TOKENS), is_used.split(CHUNK_TOKENS), strict=True):
        scores = q @ kv.key_buffer[chunk.long()].float().permute(1, 2, 0)
        lse = torch.logaddexp(lse, scores.masked_fill(~used, float("-inf")).logsumexp(-1))
    return lse
