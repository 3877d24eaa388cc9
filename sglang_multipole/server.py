"""The server process: `sglang serve`, with the plugin loaded before the flags are parsed.

Run as `python -m sglang_multipole.server <flags of sglang serve>`; `sglang-multipole serve` runs it
under a supervisor. Spawned children import this module again, so it must stay cheap to import.
"""

from __future__ import annotations

import sys

from sglang_multipole import cpu_host
from sglang_multipole.server_arguments import read_given


def main(argv: list[str]) -> None:
    """Run SGLang's server until it is stopped, or print its help with the plugin's flags."""
    cpu_host.prepare()
    from sglang.srt.plugins import load_plugins

    # `sglang serve` loads them after it has answered --help, where our flags would be missing
    load_plugins()
    if "--help" in argv or "-h" in argv:
        from sglang.srt.server_args import prepare_server_args

        prepare_server_args(["--help"])  # ends this process
    from sglang.cli.serve import serve

    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]
    # before the user's, so that the user's win
    serve(None, cpu_host.server_arguments(read_given(argv)) + argv)


if __name__ == "__main__":
    main(sys.argv[1:])
