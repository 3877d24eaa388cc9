"""The interface of a method, and the bytes that all are compared at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from benchmarks.fidelity.block import Attended, Block

if TYPE_CHECKING:
    from benchmarks.fidelity.index_store import IndexStore

# the paper's index: one bf16 mean key, one bf16 mean value and an int16 count per 16 tokens
PAPER_TOKENS_PER_CLUSTER = 16
COUNT_BYTES = 2


def token_bytes(head_dim: int) -> int:
    """One exact token of one head: its key and its value in bf16."""
    return 2 * 2 * head_dim


def paper_bytes(block: Block, exact_tokens: int) -> float:
    """What the paper's method reads per head and step with a budget of exact_tokens."""
    head_dim = block.keys.shape[-1]
    clusters = block.num_clustered / PAPER_TOKENS_PER_CLUSTER
    return clusters * (token_bytes(head_dim) + COUNT_BYTES) + exact_tokens * token_bytes(head_dim)


class Method(ABC):
    """A way to attend to a long context by reading byte_budget bytes per KV head and step."""

    name: str

    @abstractmethod
    def attend(self, block: Block, indexes: IndexStore, byte_budget: float) -> Attended:
        """Attention of the block's queries; sinks and recent tokens are free for everyone."""

    @staticmethod
    def affordable_tokens(block: Block, byte_budget: float, index_bytes: float) -> int:
        """Exact tokens that the bytes left by the index pay for."""
        left = (byte_budget - index_bytes) / token_bytes(block.keys.shape[-1])
        return max(0, min(int(left), block.num_clustered))


def top_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[*, T] bool: the count largest of scores [*, T]."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, scores.topk(count, dim=-1).indices, True)
