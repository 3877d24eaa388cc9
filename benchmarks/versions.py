"""Where a result comes from."""

from __future__ import annotations

import torch

from sglang_multipole.sglang_compat import sglang_version


def versions() -> dict[str, str]:
    """The columns of a row that name the GPU, torch and SGLang."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "sglang": sglang_version(),
    }
