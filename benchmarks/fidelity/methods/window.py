"""Sinks and a sliding window: the newest tokens, whatever they say."""

from __future__ import annotations

import torch

from benchmarks.fidelity.methods.base import Method


class SinksAndWindow(Method):
    name = "sinks+window"

    def attend(self, block, indexes, byte_budget):
        count = self.affordable_tokens(block, byte_budget, 0.0)
        h, _, n, _ = block.queries.shape
        chosen = torch.zeros(h, n, block.num_clustered, dtype=torch.bool, device=block.keys.device)
        chosen[..., block.num_clustered - count :] = True
        return block.attend(chosen, 0.0)
