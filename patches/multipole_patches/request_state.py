"""Make `meta_info["multipole"]` one dictionary, the latest, in place of a list with one a token.

Why: SGLang collects a plugin's per-request values as a list that grows by an entry a token, which
is the wrong shape for sums and too long for long answers.
Versions: 0.5.17.
Removed by: per-request (not per-token) values of plugins in `meta_info`.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole.activity import LatestInfo

TARGET = "sglang.srt.managers.tokenizer_manager.ReqState.__init__"
TYPE = "after"


def hook(result: None, state: Any, *args: Any, **kwargs: Any) -> None:
    state.customized_info_accumulated["multipole"] = LatestInfo()
