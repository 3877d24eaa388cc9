"""Take the decode buffers out of the memory that SGLang divides into KV slots.

Why: they are allocated beside the KV pool; unpriced, they would come out of what is left for
activations and graphs.
Versions: 0.5.17.
Removed by: an upstream way to register side-car memory of the KV pool.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole import memory, sglang_compat
from sglang_multipole.config import MultipoleConfig

TARGET = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget"
TYPE = "before"


def hook(
    kvc: Any, budget_bytes: int, **keywords: Any
) -> tuple[tuple[Any, int], dict[str, Any]] | None:
    values = sglang_compat.config_values(kvc.server_args)
    if values is None or kvc.is_draft_worker or kvc.device == "cpu":
        return None
    config = MultipoleConfig.from_dict(values)
    return (kvc, budget_bytes - memory.workspace_bytes(config, kvc, budget_bytes)), keywords
