"""Add `--enable-multipole` and `--multipole-config` to the server's arguments.

Why: SGLang has no field for a plugin's arguments.
Versions: 0.5.17.
Removed by: an upstream way for plugins to declare server arguments.
"""

from __future__ import annotations

import argparse

from multipole_patches import from_cli_args
from sglang_multipole import sglang_compat
from sglang_multipole.config import BACKEND_NAME, ConfigError, MultipoleConfig

TARGET = "sglang.srt.server_args.ServerArgs.add_cli_args"
TYPE = "after"


def hook(result: None, parser: argparse.ArgumentParser) -> None:
    # without its partner the flag would parse and do nothing
    if from_cli_args.TARGET in sglang_compat.applied_hooks():
        add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    group = parser.add_argument_group("Multipole attention")
    group.add_argument(
        "--enable-multipole",
        action="store_true",
        help="Decode long contexts sparsely, with cluster centroids in place of distant tokens "
        f"(the same as --decode-attention-backend {BACKEND_NAME}).",
    )
    group.add_argument(
        "--multipole-config",
        type=_config_values,
        default=None,
        metavar="JSON|@FILE",
        help="Settings of multipole attention, for example '{\"token_budget\": 1024}', or @FILE "
        "with such JSON.",
    )


def _config_values(text: str) -> dict:
    try:
        return MultipoleConfig.parse(text).to_dict()
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
