"""Where a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from sglang_multipole.sglang_compat import sglang_version


def versions(commit: str = "") -> dict[str, str]:
    """The columns of a row that name the commit, the GPU, torch and SGLang.

    Args:
        commit: for a machine that has no git repository; else it is asked for.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "commit": commit_of_rows(commit),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "sglang": sglang_version(),
    }


def commit_of_rows(given: str = "") -> str:
    """The commit that a row names: the given one, or else this repository's.

    Raises:
        RuntimeError: none is given and there is no git repository.
    """
    if given:
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("versions: no git repository here; give --commit")
    return done.stdout.strip()
