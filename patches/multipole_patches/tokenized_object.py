"""Check a request's own settings before it is sent to the scheduler.

Why: `custom_params` is free for extensions and checked by nobody; a wrong value must be answered
with HTTP 400, which is what SGLang makes of a ValueError raised here.
Versions: 0.5.17.
Removed by: an upstream validator of extensions' `custom_params`.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole import request_settings, sglang_compat
from sglang_multipole.config import MultipoleConfig

TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
TYPE = "after"


def hook(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    custom_params = result.sampling_params.custom_params
    values = sglang_compat.config_values(manager.server_args)
    if custom_params is not None and values is not None:
        request_settings.token_budget(custom_params, MultipoleConfig.from_dict(values))
