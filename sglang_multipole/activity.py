"""Proof of activity: per request and in total, what the attention code says it attended to.

The numbers are counted by the attention code on the device; the host adds them up and divides by
the number of layers. Only a step that SGLang's own dense attention did is counted by the host: as
dense, with the rows' lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from multipole_kernels.torch_decode import (
    CONTEXT_TOKENS,
    DENSE_STEPS,
    EXACT_TOKENS,
    SPARSE_STEPS,
)


@dataclasses.dataclass
class Activity:
    """Sums over decode steps; tokens are means over layers and KV heads.

    sparse_steps: every layer had clusters for the row; dense_steps: no layer had. exact_tokens:
    attended exactly; context_tokens: there were. segments_built: sealed segments clustered for the
    request; segments_shared: found ready when it began.
    """

    sparse_steps: int = 0
    dense_steps: int = 0
    exact_tokens: int = 0
    context_tokens: int = 0
    segments_built: int = 0
    segments_shared: int = 0

    def add_step(self, counters: Sequence[int], num_layers: int) -> None:
        """Add one step of one row: its counters, summed over the layers by the device."""
        self.sparse_steps += counters[SPARSE_STEPS] == num_layers
        self.dense_steps += counters[DENSE_STEPS] == num_layers
        self.exact_tokens += round(counters[EXACT_TOKENS] / num_layers)
        self.context_tokens += round(counters[CONTEXT_TOKENS] / num_layers)

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class ActivityEntry:
    """Stands in `Req.customized_info` for a list with one entry a token.

    SGLang sends the slice of the tokens that are new; ours is always one entry, the sums so far, so
    that nothing grows with the length of the answer.
    """

    def __init__(self, activity: Activity):
        self.activity = activity
        self._is_finished = False

    def finish(self) -> bool:
        """Note that the request has ended; false if that was noted before."""
        was_finished, self._is_finished = self._is_finished, True
        return not was_finished

    def __getitem__(self, new_tokens: slice) -> list[dict[str, int]]:
        return [self.activity.to_dict()]


class LatestInfo(dict):
    """What `meta_info["multipole"]` is in the tokenizer process: the last entry that arrived.

    SGLang extends and slices it as a list of entries, one a token.
    """

    def extend(self, entries: Sequence[dict[str, int] | None]) -> None:
        for entry in entries:
            if entry is not None:
                self.update(entry)

    def __getitem__(self, key):
        return self if isinstance(key, slice) else super().__getitem__(key)
