"""The entry point that SGLang calls in each of its processes.

It registers and does nothing else: SGLang logs what is raised here and goes on without us.
"""

from __future__ import annotations

import inspect

from sglang_multipole.config import BACKEND_NAME


def register() -> None:
    """Register the backend's name and the hooks of this process."""
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from multipole_patches import ARGUMENT_PATCHES, SCHEDULER_PATCHES, engine_arguments
    from multipole_patches import register as register_hooks

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    register_hooks(ARGUMENT_PATCHES)
    engine_arguments.apply()
    if _is_scheduler_process():
        _register_backend()
        register_hooks(SCHEDULER_PATCHES)


def register_scheduler() -> None:
    """Make this process, whose plugins are loaded, one that can run the model.

    Raises:
        RuntimeError: a hook does not apply.
    """
    from multipole_patches import SCHEDULER_PATCHES, apply_now

    _register_backend()
    apply_now(SCHEDULER_PATCHES)


def _register_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_multipole.backend import create_backend

    register_attention_backend(BACKEND_NAME)(create_backend)


def _is_scheduler_process() -> bool:
    """SGLang gives plugins no role, but its scheduler's main function is on the stack."""
    return any(frame.function == "run_scheduler_process" for frame in inspect.stack(context=0))
