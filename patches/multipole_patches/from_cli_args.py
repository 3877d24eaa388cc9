"""Take the multipole arguments from the command line and the YAML file into ServerArgs.

Why: `from_cli_args` copies declared fields only, so a plugin's flag would parse and do nothing. The
configuration rides on an underscore attribute, which reaches every process with the pickle.
Versions: 0.5.17.
Removed by: an upstream way for plugins to declare server arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from sglang_multipole import arguments

TARGET = "sglang.srt.server_args.ServerArgs.from_cli_args"
TYPE = "around"


def hook(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    try:
        config = arguments.requested_config(vars(args))
        if config is None:
            return original(cls, args)
        server_args = original(cls, args)
        arguments.attach(server_args, config)
    except ValueError as error:
        # the answer to a wrong command line is one line, as argparse gives it, not a traceback
        if not isinstance(error, arguments.USER_ERRORS):
            raise
        sys.stderr.write(f"sglang serve: error: {error}\n")
        raise SystemExit(2) from error
    return server_args
