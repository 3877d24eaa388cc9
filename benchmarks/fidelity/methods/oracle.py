"""The tokens with the largest true probability, known without reading anything.

A KV head's query heads share the tokens: the probabilities are summed over the group. With
`charged_as` the oracle may use only the tokens that another method can pay for after its index,
which tells that method's selection error from its budget.
"""

from __future__ import annotations

from benchmarks.fidelity.methods.base import Method, top_tokens


class OracleTopK(Method):
    def __init__(self, name: str = "oracle", charged_as: Method | None = None) -> None:
        self.name, self.charged_as = name, charged_as

    def attend(self, block, indexes, byte_budget):
        index_bytes = self.charged_as.index_bytes(block) if self.charged_as else 0.0
        count = self.affordable_tokens(block, byte_budget, index_bytes)
        probability = (block.candidates - block.dense_lse[..., None]).exp().sum(1)
        return block.attend(top_tokens(probability, count), index_bytes)
