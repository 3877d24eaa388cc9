"""A request of the pool's model: what SGLang's radix cache and our planner read of a Req."""

from __future__ import annotations

import dataclasses
from array import array
from types import SimpleNamespace

import numpy as np
import torch

from sglang_multipole.activity import Activity

MAX_LEN = 176  # tokens of a request; a request that gets there is finished
PATH_MODULUS = (1 << 61) - 1


@dataclasses.dataclass(eq=False)
class Request:
    """What SGLang's radix cache and our planner read of a Req, and the tokens it will have.

    tokens: prompt and all sampled tokens, the last of them not known to the scheduler yet. path[i]:
    hash of tokens[: i + 1].
    """

    rid: str
    origin_input_ids: array
    salt: int
    output_ids: array = dataclasses.field(default_factory=lambda: array("q"))
    tokens: array = dataclasses.field(default_factory=lambda: array("q"))
    path: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(MAX_LEN + 8, np.int64))
    num_hashed: int = 0
    req_pool_idx: int | None = None
    kv_committed_len: int = 0
    cache_protected_len: int = 0
    last_node: object = None
    prefix_indices: torch.Tensor | None = None
    extra_key: None = None
    priority: int = 0
    inflight_middle_chunks: int = 0
    fill_len: int = 0
    incarnation: int = 0
    is_finishing: bool = False
    is_finished: bool = False
    activity: Activity = dataclasses.field(default_factory=Activity)
    sampling_params: SimpleNamespace = dataclasses.field(
        default_factory=lambda: SimpleNamespace(custom_params=None)
    )

    def __post_init__(self) -> None:
        self.tokens = array("q", self.origin_input_ids)
        self.hash_tokens()

    def hash_tokens(self) -> None:
        value = int(self.path[self.num_hashed - 1]) if self.num_hashed else 1
        for position in range(self.num_hashed, len(self.tokens)):
            value = (value * 1000003 + self.tokens[position] + 1) % PATH_MODULUS
            self.path[position] = value
        self.num_hashed = len(self.tokens)

    def sample(self) -> None:
        """The next token: one of three, by the tokens so far and the request's salt."""
        self.tokens.append((int(self.path[len(self.tokens) - 1]) // 7 + self.salt) % 3)
        self.hash_tokens()

    def get_fill_ids(self) -> array:
        return self.tokens[: self.fill_len]
