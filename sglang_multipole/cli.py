"""The command `sglang-multipole`."""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from pathlib import Path

from sglang_multipole import supervisor
from sglang_multipole.server_arguments import read_given

USAGE_ERROR = 2
DEFAULT_HOST = "127.0.0.1"  # SGLang's defaults
DEFAULT_PORT = 30000
MAX_PORT = 65535


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="sglang-multipole", description="Multipole Attention for SGLang."
    )
    subcommands = parser.add_subparsers(dest="subcommand", required=True)
    subcommands.add_parser(
        "serve",
        help="`sglang serve` with this plugin, also on a machine without a GPU",
        add_help=False,
    )
    subcommands.add_parser(
        "eval",
        help="accuracy on long-context tasks, against any OpenAI-compatible server",
        add_help=False,
    )
    demo = subcommands.add_parser(
        "demo-model",
        help="make SmolLM2-135M-Instruct, the demo's model, and print its folder",
    )
    demo.add_argument("--folder", type=Path, help="where to keep it, instead of the user's cache")
    # serve takes SGLang's flags, which this parser must not know
    if argv[:1] == ["serve"]:
        return serve(argv[1:])
    if argv[:1] == ["eval"]:
        from sglang_multipole.evaluation import command

        return command.main(argv[1:])
    arguments = parser.parse_args(argv)
    return make_demo_model(arguments.folder)


def serve(argv: list[str]) -> int:
    """Start the server under a supervisor, once it is clear that it can listen on its port."""
    if "--help" in argv or "-h" in argv:
        from sglang_multipole import server

        server.main(argv)
        return 0
    try:
        given = read_given(argv)
        if not given.get("model_path") and not given.get("model"):
            raise ValueError("a model is required, got none; add --model-path <folder or name>")
        require_free_port(given.get("host") or DEFAULT_HOST, _read_port(given.get("port")))
    except ValueError as error:
        sys.stderr.write(f"sglang-multipole serve: {error}\n")
        return USAGE_ERROR
    code = supervisor.run([sys.executable, "-m", "sglang_multipole.server", *argv])
    if code not in (0, 128 + 2, 128 + 15):
        sys.stderr.write(
            f"sglang-multipole serve: the server ended with code {code}; the last error above "
            "says why\n"
        )
    return code


def make_demo_model(folder: Path | None) -> int:
    """Make the demo's model unless it exists; the last line on stdout is its folder."""
    from sglang_multipole import demo_model

    try:
        folder = demo_model.make(folder or demo_model.default_folder())
    except RuntimeError as error:
        sys.stderr.write(f"sglang-multipole demo-model: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def require_free_port(host: str, port: int) -> None:
    """Refuse an address that a server could not listen on.

    Raises:
        ValueError: it is in use, or is no address of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # as the server itself does: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"the port must be free, got {host}:{port} in use by another process; "
                "choose another with --port"
            ) from error
        raise ValueError(
            f"the address must be one of this machine, got {host}:{port} ({error.strerror}); "
            "choose another with --host and --port"
        ) from error


def _read_port(text: str | None) -> int:
    if not text:
        return DEFAULT_PORT
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise ValueError(f"the port must be a number up to {MAX_PORT}, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
