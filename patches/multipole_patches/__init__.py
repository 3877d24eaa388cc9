"""What this extension changes in SGLang, one change a file.

Every module names its target, why it is changed, the SGLang versions the change holds for, and the
upstream change that would make it unnecessary; README.md beside this package is the list.

SGLang logs an exception of a plugin or of a hook and serves on without it. So registering does
almost nothing, and `verify_applied` is called where an exception does stop the server.
"""

from __future__ import annotations

from types import ModuleType

from multipole_patches import (
    add_cli_args,
    alloc_memory_pool,
    cell_size,
    decode_graph_runner,
    from_cli_args,
    internal_state,
    kv_budget,
    metrics_reporter,
    process_batch_result,
    request_state,
    run_batch,
    tokenized_object,
)
from sglang_multipole import sglang_compat

# in every process that loads plugins
ARGUMENT_PATCHES: tuple[ModuleType, ...] = (add_cli_args, from_cli_args)
# where requests are tokenized and answered, once multipole attention is asked for
TOKENIZER_PATCHES: tuple[ModuleType, ...] = (request_state, tokenized_object)
# where the model runs
SCHEDULER_PATCHES: tuple[ModuleType, ...] = (
    cell_size,
    kv_budget,
    alloc_memory_pool,
    decode_graph_runner,
    run_batch,
    process_batch_result,
    internal_state,
    metrics_reporter,
)


def register(patches: tuple[ModuleType, ...]) -> None:
    """Register hooks; SGLang applies them after all plugins have registered theirs."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for patch in patches:
        HookRegistry.register(patch.TARGET, patch.hook, HookType(patch.TYPE))


def apply_now(patches: tuple[ModuleType, ...]) -> None:
    """Register hooks and apply them, after SGLang has applied the first.

    Raises:
        RuntimeError: see verify_applied.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    if any(patch.TARGET not in sglang_compat.applied_hooks() for patch in patches):
        register(patches)
        HookRegistry.apply_hooks()
    verify_applied(patches)


def verify_applied(patches: tuple[ModuleType, ...]) -> None:
    """Raise unless the hooks are in place.

    Raises:
        RuntimeError: names the hooks, the SGLang version found and those checked.
    """
    applied = sglang_compat.applied_hooks()
    missing = [patch.TARGET for patch in patches if patch.TARGET not in applied]
    if missing:
        raise RuntimeError(
            f"multipole: the hooks on {', '.join(missing)} are not applied, so the server would "
            f"not be what was asked for. SGLang {sglang_compat.sglang_version()} is installed; "
            f"checked with {', '.join(sglang_compat.TESTED_VERSIONS)}. Install a checked version: "
            "pip install 'sglang-multipole[sglang]'"
        )
