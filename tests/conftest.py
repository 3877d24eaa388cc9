"""Settings of all tests."""

from __future__ import annotations

import torch

# the tensors are small: more threads only wait for each other, a hundred times slower when the
# machine is busy
torch.set_num_threads(1)
