"""Lets the unmodified SGLang server run on a machine without a CUDA driver.

SGLang 0.5.17 has a CPU engine, but it is not reached by `--device cpu` alone: SGLang has to be told
by an environment variable before its first import, its CUDA kernel package `sgl_kernel` cannot be
imported without a driver, and several defaults are made for GPUs. `prepare` does the first two,
`server_arguments` and `engine_arguments` the third.

A script that uses `sgl.Engine` begins with

    from sglang_multipole import cpu_host

    cpu_host.prepare()  # before SGLang is imported; does nothing where there is a CUDA driver

    import sglang as sgl
    ...
    engine = sgl.Engine(model_path=..., **cpu_host.engine_arguments())
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Container
from importlib.metadata import entry_points
from pathlib import Path

logger = logging.getLogger(__name__)

USE_CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"  # SGLang's own switch
STAND_IN_PATH = Path(__file__).parent / "stand_in"

# What SGLang's parser needs on a CPU, unless the user says otherwise; each with its reason.
CPU_ARGUMENTS: dict[str, str | int | bool] = {
    # SGLang looks for an accelerator first
    "device": "cpu",
    # the default, intel_amx, needs a kernel build with AMX; this is dense prefill and dense decode,
    # and the plugin still chooses the decode backend
    "attention_backend": "torch_native",
    # the default, flashinfer, is CUDA only
    "sampling_backend": "pytorch",
    # the default, xgrammar, asks for pinned memory and stops the server at the first JSON schema
    "grammar_backend": "outlines",
    # CPUs without bf16 instructions emulate it: float32 decodes 1.5 and prefills 2.5 times as fast
    "dtype": "float32",
    # graph capture is CUDA only; the older --disable-cuda-graph is deprecated
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    # SGLang would take most of the machine's memory for the KV pool
    "max_total_tokens": 32768,
    # an idle scheduler would keep one core busy
    "sleep_on_idle": True,
}


def is_needed() -> bool:
    """Say whether SGLang has to run on its CPU engine here.

    SGLANG_USE_CPU_ENGINE=1 or =0 decides; without it, a machine is a CPU host when neither a CUDA
    driver nor a platform plugin of SGLang (another vendor's accelerator) is installed.
    """
    chosen = os.environ.get(USE_CPU_ENGINE)
    if chosen is not None:
        return chosen == "1"
    return not _has_cuda_driver() and not entry_points(group="sglang.srt.platforms")


def prepare() -> bool:
    """Make SGLang importable and runnable here; call it before SGLang is imported.

    Harmless where there is a CUDA driver, and when called twice. Child processes inherit both the
    environment and `sys.path` (multiprocessing's spawn copies it), so they need no call.

    Returns:
        Whether this is a CPU host.

    Raises:
        RuntimeError: SGLang was imported earlier and has already settled on another device.
    """
    if not is_needed():
        return False
    if os.environ.get(USE_CPU_ENGINE) != "1":
        if "sglang.srt.utils.common" in sys.modules:
            raise RuntimeError(
                "cpu_host: prepare() must run before SGLang is imported, got SGLang imported "
                "already; move it to the top of the script"
            )
        os.environ[USE_CPU_ENGINE] = "1"
    # threads that spin while they wait take the cores from those they wait for: with other work on
    # the machine, prefill-sized products took 0.9 to 4.0 s, and 0.7 to 1.5 s without spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if str(STAND_IN_PATH) not in sys.path and not _real_kernels_load():
        sys.path.insert(0, str(STAND_IN_PATH))
        importlib.invalidate_caches()
        logger.info("cpu_host: no CUDA driver, SGLang runs on its CPU engine")
    return True


def engine_arguments(given: Container[str] = ()) -> dict[str, str | int | bool]:
    """Arguments for `sgl.Engine` that this machine needs; empty where there is a CUDA driver.

    Args:
        given: names of the arguments that the caller sets itself; these are left out.
    """
    if not is_needed():
        return {}
    return {name: value for name, value in CPU_ARGUMENTS.items() if name not in given}


def server_arguments(given: Container[str] = ()) -> list[str]:
    """The same as command line flags for `sglang serve`."""
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in engine_arguments(given).items()
    ]


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _real_kernels_load() -> bool:
    # a CPU build of sgl_kernel (AMX, arm64) is better than the stand-in wherever it is installed
    try:
        importlib.import_module("sgl_kernel")
    except ImportError:
        for name in [n for n in sys.modules if n.split(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        return False
    return True
