"""Count the cluster pool's bytes per token where SGLang sizes the KV pool.

Why: the cluster pool comes out of the same budget; unpriced, it would be what runs out of memory.
Versions: 0.5.17.
Removed by: an upstream way to register side-car memory of the KV pool.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole import memory, sglang_compat
from sglang_multipole.config import MultipoleConfig

TARGET = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
TYPE = "after"


def hook(cell_size: int, configurator: Any, kvc: Any, num_layers: int) -> int | None:
    values = sglang_compat.config_values(kvc.server_args)
    if values is None or kvc.is_draft_worker:
        return None
    config = MultipoleConfig.from_dict(values)
    return cell_size + memory.bytes_per_token(config, kvc, num_layers)
