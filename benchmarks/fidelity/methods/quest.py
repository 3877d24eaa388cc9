"""Quest: pages of 16 consecutive tokens, ranked by an upper bound of their best logit.

A page keeps the element-wise minimum and maximum of its keys; the bound is the sum over the
dimensions of max(q * min, q * max). The rest of the context is dropped. Query heads that share
keys share pages: a page's score is the sum, or the largest, of the group's bounds (softmax taken
over the pages first, for the sum).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.fidelity.methods.base import Method, top_tokens


class Quest(Method):
    def __init__(self, page_size: int = 16, group: str = "sum") -> None:
        self.page_size, self.group = page_size, group
        self.name = "quest" if group == "sum" else f"quest-{group}"

    def page_bounds(self, block) -> torch.Tensor:
        """[H, G, Q, num_pages] upper bound of the logits of a page's tokens."""
        keys = block.keys[:, block.extent - block.num_clustered : block.extent]
        padding = -keys.shape[1] % self.page_size
        # repeat the last key: it changes neither minimum nor maximum
        keys = torch.cat([keys, keys[:, -1:].expand(-1, padding, -1)], 1)
        pages = keys.unflatten(1, (-1, self.page_size))
        queries = block.queries * block.sm_scale
        h, g, n, d = queries.shape
        flat = queries.reshape(h, g * n, d)
        bound = flat.clamp(min=0) @ pages.amax(2).mT + flat.clamp(max=0) @ pages.amin(2).mT
        return bound.view(h, g, n, -1)

    def attend(self, block, indexes, byte_budget):
        bounds = self.page_bounds(block)
        num_pages = bounds.shape[-1]
        index_bytes = num_pages * 2 * 2 * block.keys.shape[-1]
        tokens = self.affordable_tokens(block, byte_budget, index_bytes)
        scores = bounds.softmax(-1).sum(1) if self.group == "sum" else bounds.amax(1)
        pages = top_tokens(scores, min(tokens // self.page_size, num_pages))
        chosen = pages.repeat_interleave(self.page_size, -1)[..., : block.num_clustered]
        return block.attend(F.pad(chosen, (0, block.num_clustered - chosen.shape[-1])), index_bytes)
