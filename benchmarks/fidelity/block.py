"""A block of decode steps that share one clustered extent, and attention to a part of its tokens.

With a re-clustering every RECLUSTER_INTERVAL tokens, the queries of one interval see the same
clusters, so they are computed together. Query position p of block m (positions 128m to 128m + 127)
sees clusters of the tokens [NUM_SINKS, 128(m - 1)); the sinks and the 128 to 255 tokens from there
to p are attended exactly by every method and are in no budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.fidelity.rope import RopeTable

NUM_SINKS = 10
RECLUSTER_INTERVAL = 128


def decode_blocks(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, extent) of the blocks of decode positions [first, end)."""
    while first < end:
        block = first // RECLUSTER_INTERVAL
        stop = min((block + 1) * RECLUSTER_INTERVAL, end)
        yield first, stop, max((block - 1) * RECLUSTER_INTERVAL, NUM_SINKS)
        first = stop


@dataclass(frozen=True)
class Attended:
    """A method's answer for a block of Q steps.

    out [H, G, Q, D]; exact_lse [H, G, Q], log-sum-exp of the exactly attended tokens;
    tokens [H, Q], exact tokens beside the sinks and the recent ones; index_bytes a head and step.
    """

    out: torch.Tensor
    exact_lse: torch.Tensor
    tokens: torch.Tensor
    index_bytes: float


@dataclass(frozen=True)
class Block:
    """Queries [H, G, Q, D] at positions [Q]; keys, values [H, T, D] of all tokens up to the last.

    `heads` says which rows of per-model tables (of all layers' KV heads) the H heads are;
    num_kv_heads is the number of KV heads of one layer.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    extent: int
    rope: RopeTable
    sm_scale: float
    heads: slice
    num_kv_heads: int

    @property
    def num_clustered(self) -> int:
        """Tokens that a method may leave out or approximate."""
        return self.extent - NUM_SINKS

    @cached_property
    def logits(self) -> torch.Tensor:
        """[H, G, Q, T] natural-log scores, -inf for tokens behind the query."""
        h, g, n, d = self.queries.shape
        flat = self.queries.reshape(h, g * n, d) * self.sm_scale
        scores = (flat @ self.keys.mT).view(h, g, n, -1)
        recent = torch.arange(self.extent, scores.shape[-1], device=scores.device)
        scores[..., self.extent :].masked_fill_(recent > self.positions[:, None], float("-inf"))
        return scores

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[H, G, Q, num_clustered] scores of the clustered tokens: a view of logits."""
        return self.logits[..., NUM_SINKS : self.extent]

    @cached_property
    def always_lse(self) -> torch.Tensor:
        """[H, G, Q] log-sum-exp of the sinks and the recent tokens."""
        sinks = self.logits[..., :NUM_SINKS].logsumexp(-1)
        return torch.logaddexp(sinks, self.logits[..., self.extent :].logsumexp(-1))

    @cached_property
    def dense_lse(self) -> torch.Tensor:
        """[H, G, Q] log-sum-exp of all tokens."""
        return torch.logaddexp(self.always_lse, self.candidates.logsumexp(-1))

    @cached_property
    def dense_out(self) -> torch.Tensor:
        """[H, G, Q, D] full attention."""
        return self._weigh((self.logits - self.dense_lse[..., None]).exp(), self.values)

    def attend(
        self,
        chosen: torch.Tensor,
        index_bytes: float,
        tail: torch.Tensor | None = None,
        tail_values: torch.Tensor | None = None,
    ) -> Attended:
        """Attend to the always exact tokens, the chosen ones, and what stands for the others.

        Args:
            chosen: [H, Q, num_clustered] bool.
            index_bytes: read per head and step to find them.
            tail: [H, G, Q, K] log-weights of the stand-ins, -inf for none.
            tail_values: [H, K, D].
        """
        exact = F.pad(chosen, (NUM_SINKS, self.logits.shape[-1] - self.extent), value=True)
        scores = self.logits.masked_fill(~exact[:, None], float("-inf"))
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        exact_lse = weights.sum(-1).log() + top[..., 0]
        lse = exact_lse if tail is None else torch.logaddexp(exact_lse, tail.logsumexp(-1))
        out = self._weigh(weights, self.values) * (top - lse[..., None]).exp()
        if tail is not None:
            out = out + self._weigh((tail - lse[..., None]).exp(), tail_values)
        return Attended(out, exact_lse, chosen.sum(-1), index_bytes)

    @staticmethod
    def _weigh(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        h, g, n, t = weights.shape
        return (weights.view(h, g * n, t) @ values).view(h, g, n, -1)
