"""What would keep multipole attention from being served here, found without starting a server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import logging
import os
import platform
from collections.abc import Iterator
from typing import Any

from sglang_multipole import cpu_host, serve_command
from sglang_multipole.server_arguments import read_given

PLUGIN_GROUP = "sglang.srt.plugins"
PLUGIN_NAME = "multipole"
PLUGIN_VARIABLE = "SGLANG_PLUGINS"  # SGLang's list of the plugins to load
MIN_CAPABILITY = (8, 0)  # the oldest architecture that the kernels are compiled for


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; whatever is not ok would stop the server."""

    is_ok: bool
    subject: str
    detail: str


def examine(argv: list[str]) -> Iterator[Finding]:
    """Findings for a server with these flags of `sglang serve`, the cheap ones first."""
    yield from _versions()
    yield _entry_point()
    try:
        cpu_host.prepare()
        import sglang.srt.server_args  # noqa: F401
    except Exception as error:  # whatever SGLang's import raises is the finding
        yield Finding(False, "SGLang", f"must be importable, got {type(error).__name__}: {error}")
        return
    yield _hooks()
    yield _device()
    given = read_given(argv)
    yield _port(given)
    if not given.get("model_path") and not given.get("model"):
        yield Finding(True, "model", "none given; add --model-path to have it checked")
        return
    yield from _server(argv, given)


def _versions() -> Iterator[Finding]:
    from sglang_multipole.sglang_compat import TESTED_VERSIONS

    versions = {}
    for name in ("sglang-multipole", "sglang", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding(True, "versions", f"Python {platform.python_version()}, {listed}")
    tested = ", ".join(TESTED_VERSIONS)
    if versions.get("sglang") not in TESTED_VERSIONS:
        yield Finding(
            False,
            "SGLang",
            f"must be {tested}, got {versions.get('sglang', 'none')}; "
            "pip install 'sglang-multipole[sglang]'",
        )


def _entry_point() -> Finding:
    subject = "plugin"
    entries = importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if not entries:
        return Finding(
            False,
            subject,
            f"SGLang must find the entry point {PLUGIN_NAME!r} of {PLUGIN_GROUP!r}, got none; "
            "install the package (pip install sglang-multipole) in SGLang's environment",
        )
    allowed = os.environ.get(PLUGIN_VARIABLE)
    if allowed and PLUGIN_NAME not in [name.strip() for name in allowed.split(",")]:
        return Finding(
            False,
            subject,
            f"{PLUGIN_VARIABLE} must name {PLUGIN_NAME}, got {allowed!r}; unset it, or add it",
        )
    return Finding(True, subject, f"entry point found: {next(iter(entries)).value}")


def _hooks() -> Finding:
    from sglang.srt.plugins import load_plugins

    from multipole_patches import ARGUMENT_PATCHES, SCHEDULER_PATCHES, TOKENIZER_PATCHES, apply_now

    patches = (*ARGUMENT_PATCHES, *TOKENIZER_PATCHES, *SCHEDULER_PATCHES)
    try:
        load_plugins()
        apply_now(patches)
    except Exception as error:  # an import of a hook's target can raise anything
        return Finding(False, "hooks", str(error))
    return Finding(True, "hooks", f"all {len(patches)} apply")


def _device() -> Finding:
    import torch

    if cpu_host.is_needed():
        return Finding(True, "device", "no CUDA driver: SGLang's CPU engine, for trying things out")
    if not torch.cuda.is_available():
        return Finding(
            False, "device", "torch must see the GPU, got none; see nvidia-smi and the driver"
        )
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    detail = (
        f"{properties.name}, compute capability {capability[0]}.{capability[1]}, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, driver {_driver()}"
    )
    if capability < MIN_CAPABILITY:
        return Finding(False, "device", f"{detail}; compute capability must be at least 8.0")
    return Finding(True, "device", detail)


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().split("  ")[1].strip()
    except (OSError, IndexError):
        return "unknown"


def _port(given: dict[str, str]) -> Finding:
    try:
        address = serve_command.require_free_address(given)
    except ValueError as error:
        return Finding(False, "address", str(error))
    return Finding(True, "address", f"{address} is free")


def _server(argv: list[str], given: dict[str, str]) -> Iterator[Finding]:
    """What SGLang's parser and our refusals say, then the model and its memory."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_multipole import refusals, sglang_compat
    from sglang_multipole.config import MultipoleConfig

    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _quiet_logging():
            server_args = prepare_server_args(cpu_host.server_arguments(given) + argv)
    except SystemExit:
        lines = said.getvalue().strip().splitlines() or ["refused without a word"]
        yield Finding(False, "arguments", lines[-1].partition("error: ")[2] or lines[-1])
        return
    except Exception as error:  # an unreadable model raises what transformers likes
        yield Finding(False, "arguments", f"{type(error).__name__}: {error}")
        return
    values = sglang_compat.config_values(server_args)
    if values is None:
        yield Finding(True, "arguments", "multipole attention is off; add --enable-multipole")
        return
    config = MultipoleConfig.from_dict(values)
    yield Finding(
        True,
        "arguments",
        f"accepted: token budget {config.token_budget}, exact below {config.min_context_text}",
    )
    yield _events(config)
    model = sglang_compat.model_sizes(server_args)
    problems = (
        []
        if cpu_host.is_needed()
        else refusals.kernel_problems(model.dtype, model.head_dim, model.gqa_group_size)
    )
    yield Finding(
        not problems,
        "model",
        f"{model.architecture}: {model.num_layers} layers, {model.num_kv_heads} KV heads of "
        f"{model.head_dim}, {model.gqa_group_size} query heads each, {model.dtype}"
        + "".join(f"; {problem}" for problem in problems),
    )
    yield _memory(config, model, server_args.max_total_tokens)


def _events(config: Any) -> Finding:
    from sglang_multipole.events import EventPublisher

    if not config.events_endpoint:
        return Finding(True, "events", "no events_endpoint, none are sent")
    try:
        EventPublisher(config.events_endpoint).close()
    except RuntimeError as error:
        return Finding(False, "events", str(error))
    return Finding(True, "events", f"{config.events_endpoint} is free")


def _memory(config: Any, model: Any, max_total_tokens: int | None) -> Finding:
    from sglang_multipole import memory

    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype.itemsize
    pool_bytes = memory.bytes_of_shape(
        config, model.num_layers, model.num_kv_heads, model.head_dim, model.dtype
    )
    detail = (
        f"{pool_bytes} bytes a token of KV cache, beside its {kv_bytes} "
        f"({100 * pool_bytes / kv_bytes:.1f} %), on each rank; segments of {config.segment_size} "
        "tokens"
    )
    if max_total_tokens:
        total = pool_bytes * max_total_tokens / 2**30
        detail += f"; {total:.3f} GiB for --max-total-tokens {max_total_tokens}"
    return Finding(True, "cluster pool", detail)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """SGLang logs pages of warnings while it resolves its arguments."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
