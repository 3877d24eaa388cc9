"""What one request may set: `sampling_params.custom_params["multipole"]`.

    {"multipole": false}                    attended exactly, whatever its length
    {"multipole": {"token_budget": 2048}}   another budget than the server's

Absent, null, true and {} all mean the server's configuration.
"""

from __future__ import annotations

from typing import Any

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.segment_planner import SWITCHED_OFF
from sglang_multipole.suggestion import suggest

NAME = "multipole"
_WHERE = 'custom_params["multipole"]'
_EXAMPLE = 'examples: {"multipole": false}, {"multipole": {"token_budget": 2048}}'
_KEYS = ("token_budget",)


class RequestSettingsError(ValueError):
    """A request asked for what it cannot have; the message says what to change."""


def token_budget(custom_params: Any, config: MultipoleConfig) -> int:
    """Tokens per KV head for a request with these custom_params; SWITCHED_OFF for exact attention.

    Raises:
        RequestSettingsError: names the key, the limits and the unit.
    """
    if custom_params is None:
        return config.token_budget
    if not isinstance(custom_params, dict):
        raise RequestSettingsError(
            f"custom_params must be a JSON object, got {_brief(custom_params)}; {_EXAMPLE}"
        )
    settings = custom_params.get(NAME)
    if settings is None or settings is True:
        return config.token_budget
    if settings is False:
        return SWITCHED_OFF
    if not isinstance(settings, dict):
        raise RequestSettingsError(
            f"{_WHERE} must be true, false or a JSON object, got {_brief(settings)}; {_EXAMPLE}"
        )
    for key in settings:
        if key not in _KEYS:
            raise RequestSettingsError(
                f"{_WHERE}: unknown key {_brief(key)}; {suggest(str(key), _KEYS)}"
            )
    budget = settings.get("token_budget")
    if budget is None:
        return config.token_budget
    limit = config.token_budget_limit
    if type(budget) is not int or not 0 <= budget <= limit:
        raise RequestSettingsError(
            f"{_WHERE}: token_budget must be a whole number of tokens, 0 to {limit} (the server's "
            f'max_token_budget), got {_brief(budget)}; for exact attention send {{"multipole": '
            "false}"
        )
    return budget


def accepted_token_budget(custom_params: Any, config: MultipoleConfig) -> int:
    """The same where a wrong setting can no longer be answered: it counts as none.

    A request that came past the tokenizer process's check (another frontend, a restored session)
    must not stop the scheduler.
    """
    try:
        return token_budget(custom_params, config)
    except RequestSettingsError:
        return config.token_budget


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
