"""From what the user asked for to ServerArgs: the same for command line, YAML file and Engine."""

from __future__ import annotations

import types
from collections.abc import MutableMapping
from typing import Any

from sglang_multipole import refusals, sglang_compat
from sglang_multipole.config import BACKEND_NAME, ConfigError, MultipoleConfig

NAMES = ("enable_multipole", "multipole_config")
USER_ERRORS = (ConfigError, refusals.RefusedError)

_BACKEND_ARGUMENTS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def requested_config(arguments: MutableMapping[str, Any]) -> MultipoleConfig | None:
    """The configuration if multipole is asked for, else None; sets the decode backend's name.

    Args:
        arguments: the server's arguments by field name, before SGLang resolves them; changed so
            that SGLang splits prefill and decode.

    Raises:
        ConfigError: the configuration is wrong, or given without asking for multipole.
        RefusedError: something else is asked for that cannot be combined with it.
    """
    named = [name for name in _BACKEND_ARGUMENTS if arguments.get(name) == BACKEND_NAME]
    values = arguments.get("multipole_config")
    if not arguments.get("enable_multipole") and not named:
        if values is not None:
            raise ConfigError("--multipole-config is given without --enable-multipole; add it")
        return None
    config = MultipoleConfig.parse(values)
    if "prefill_attention_backend" in named:
        raise ConfigError(
            f"--prefill-attention-backend {BACKEND_NAME}: multipole attention decodes only; choose "
            "a dense backend for prefill, or leave the argument out"
        )
    if "attention_backend" in named:
        arguments["attention_backend"] = None
    if arguments.get("decode_attention_backend") is None:
        arguments["decode_attention_backend"] = BACKEND_NAME
    if config.dense_backend != "auto" and arguments.get("prefill_attention_backend") is None:
        arguments["prefill_attention_backend"] = config.dense_backend
    refusals.check_requested(types.SimpleNamespace(**arguments))
    return config


def attach(server_args: Any, config: MultipoleConfig) -> None:
    """Refuse what cannot be served; else let the configuration travel with ServerArgs.

    What the model chooses is chosen here, once for all processes.

    Raises:
        ConfigError: what the model chooses does not go with the configuration.
        RefusedError: an argument or the model is in the way.
        RuntimeError: a hook of this process could not be applied.
    """
    from multipole_patches import TOKENIZER_PATCHES, apply_now

    apply_now(TOKENIZER_PATCHES)
    refusals.check_arguments(server_args, config)
    config = config.for_model(sglang_compat.rope_base(server_args.get_model_config()))
    setattr(server_args, sglang_compat.ARGS_ATTRIBUTE, config.to_dict())
