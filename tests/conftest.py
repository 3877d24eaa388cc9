"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
import torch

from sglang_multipole import cpu_host

pytest_plugins = ["tests.server_fixture"]

# before any test imports SGLang
cpu_host.prepare()

# the tensors are small: more threads only wait for each other, a hundred times slower when the
# machine is busy
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import interpreted_rounding

    interpreted_rounding.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("kernel") and not (is_interpreted or has_gpu):
            item.add_marker(pytest.mark.skip("a Triton kernel: TRITON_INTERPRET=1 or a GPU"))
        if item.get_closest_marker("interpreted") and not is_interpreted:
            item.add_marker(pytest.mark.skip("Triton on CPU tensors: TRITON_INTERPRET=1"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip("needs an NVIDIA GPU"))
