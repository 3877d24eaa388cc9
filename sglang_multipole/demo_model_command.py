"""`sglang-multipole demo-model`: make the demo's model and print its folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "make SmolLM2-135M-Instruct, the demo's model, and print its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where to keep it, instead of the user's cache")


def run(arguments: argparse.Namespace) -> int:
    """Make the model unless it exists; the last line on stdout is its folder."""
    from sglang_multipole import demo_model

    try:
        folder = demo_model.make(arguments.folder or demo_model.default_folder())
    except RuntimeError as error:
        sys.stderr.write(f"sglang-multipole demo-model: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0
