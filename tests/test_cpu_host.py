"""cpu_host: a machine without a CUDA driver is recognised, and SGLang is prepared for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_multipole import cpu_host


@pytest.fixture(autouse=True)
def _no_choice_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu_host.USE_CPU_ENGINE, raising=False)


def run_python(code: str, folder: Path | None = None, **environment: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    clean = {k: v for k, v in os.environ.items() if k != cpu_host.USE_CPU_ENGINE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(("chosen", "expected"), [("1", True), ("0", False)])
def test_the_users_choice_decides(
    monkeypatch: pytest.MonkeyPatch, chosen: str, expected: bool
) -> None:
    monkeypatch.setenv(cpu_host.USE_CPU_ENGINE, chosen)
    assert cpu_host.is_needed() is expected


def test_a_machine_without_driver_is_a_cpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_host, "_has_cuda_driver", lambda: False)
    monkeypatch.setattr(cpu_host, "entry_points", lambda group: [])
    assert cpu_host.is_needed()


def test_another_vendors_platform_plugin_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_host, "_has_cuda_driver", lambda: False)
    monkeypatch.setattr(cpu_host, "entry_points", lambda group: ["other_accelerator"])
    assert not cpu_host.is_needed()


def test_prepare_changes_nothing_with_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_host, "_has_cuda_driver", lambda: True)
    path = list(sys.path)
    assert cpu_host.prepare() is False
    assert sys.path == path
    assert cpu_host.USE_CPU_ENGINE not in os.environ
    assert cpu_host.engine_arguments() == {}
    assert cpu_host.server_arguments() == []


def test_prepare_after_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_host, "is_needed", lambda: True)
    monkeypatch.setitem(sys.modules, "sglang.srt.utils.common", sys)
    with pytest.raises(RuntimeError, match="before SGLang is imported"):
        cpu_host.prepare()


def test_the_users_arguments_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_host, "is_needed", lambda: True)
    arguments = cpu_host.server_arguments({"dtype", "device"})
    assert "--attention-backend=torch_native" in arguments
    assert "--sleep-on-idle" in arguments
    assert not [a for a in arguments if a.startswith(("--dtype", "--device"))]


USE_STAND_IN = f"import sys; sys.path.insert(0, {str(cpu_host.STAND_IN_PATH)!r})\n"


def test_every_kernel_name_exists_and_names_itself_when_called() -> None:
    output = run_python(
        USE_STAND_IN
        + """
import sgl_kernel
from sgl_kernel import scalar_types
from sgl_kernel.speculative.tree import build
scalar_types.uint4b8.size_bits  # read while SGLang is imported
assert not hasattr(sgl_kernel, "__wrapped__")
for kernel in (sgl_kernel.rmsnorm, build):
    try:
        kernel(1, out=None)
    except NotImplementedError as error:
        print(error)
"""
    )
    first, second = output.splitlines()
    assert first.startswith("sgl_kernel.rmsnorm: needs SGLang's CUDA kernels")
    assert second.startswith("sgl_kernel.speculative.tree.build: ")


@pytest.mark.skipif(not cpu_host.is_needed(), reason="has a CUDA driver: nothing to prepare")
def test_spawned_children_are_prepared_though_the_main_module_is_not_importable() -> None:
    """A main module given by -c is not imported again by children: sys.path carries it over."""
    output = run_python(
        """
import multiprocessing
from sglang_multipole import cpu_host
assert cpu_host.prepare() and cpu_host.prepare()
import sys
assert sys.path.count(str(cpu_host.STAND_IN_PATH)) == 1
import importlib
with multiprocessing.get_context("spawn").Pool(1) as pool:
    print(pool.apply(importlib.util.find_spec, ("sgl_kernel",)).origin)
    print(pool.apply(cpu_host.os.getenv, (cpu_host.USE_CPU_ENGINE,)))
"""
    )
    origin, chosen = output.splitlines()[-2:]
    assert Path(origin).is_relative_to(cpu_host.STAND_IN_PATH)
    assert chosen == "1"
