"""Build the cluster pool beside the KV pool, and watch the KV pool's allocator.

Why: the model is loaded, both of SGLang's pools exist and the attention backends do not yet: the
only moment at which everything we need is there. The allocator's own methods are wrapped on the
instance, so that no other allocator is touched; every slot that gets new content passes `alloc*`.
Versions: 0.5.17.
Removed by: an upstream hook after memory pool creation, and an allocation listener.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole import sglang_compat

TARGET = "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool"
TYPE = "after"


def hook(result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
    values = sglang_compat.config_values(runner.server_args)
    if values is None or runner.is_draft_worker:
        return
    from sglang_multipole.attach import attach_runtime

    attach_runtime(runner, values)
