"""What the interpreter stores in bfloat16 is what PyTorch would."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted


@triton.jit
def _copy_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    tl.store(target_ptr + offset, tl.load(source_ptr + offset).to(tl.bfloat16))


def test_bfloat16_is_rounded_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1009, generator=generator) * 10.0 ** torch.linspace(-40, 38, 1009)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2 - 2.0**-8, 0.0, -0.0, 1e-45])
    beyond = torch.tensor(
        [3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 2.0**-130, -(2.0**-126)]
    )
    source = torch.cat([random, ties, beyond, torch.zeros(1)])
    assert len(source) == 1024
    target = torch.empty(1024, dtype=torch.bfloat16)
    _copy_kernel[(1,)](source, target, 1024)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
