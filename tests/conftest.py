"""Settings of all tests."""

from __future__ import annotations

import torch

from sglang_multipole import cpu_host

pytest_plugins = ["tests.server_fixture"]

# before any test imports SGLang
cpu_host.prepare()

# the tensors are small: more threads only wait for each other, a hundred times slower when the
# machine is busy
torch.set_num_threads(1)
