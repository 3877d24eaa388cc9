"""`sglang-multipole serve`: SGLang's server under a supervisor, once it can listen on its port."""

from __future__ import annotations

import errno
import socket
import sys

from sglang_multipole import supervisor
from sglang_multipole.server_arguments import read_given

HELP = "`sglang serve` with this plugin, also on a machine without a GPU; --dry-run only checks"
DRY_RUN = "--dry-run"
USAGE_ERROR = 2
DEFAULT_HOST = "127.0.0.1"  # SGLang's defaults
DEFAULT_PORT = 30000
MAX_PORT = 65535


def run(argv: list[str]) -> int:
    """Start the server under a supervisor, once it is clear that it can listen on its port."""
    if DRY_RUN in argv:
        from sglang_multipole import doctor_command

        return doctor_command.report([flag for flag in argv if flag != DRY_RUN])
    if "--help" in argv or "-h" in argv:
        from sglang_multipole import server

        server.main(argv)
        return 0
    try:
        given = read_given(argv)
        if not given.get("model_path") and not given.get("model"):
            raise ValueError("a model is required, got none; add --model-path <folder or name>")
        require_free_address(given)
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


def require_free_address(given: dict[str, str]) -> str:
    """The address among the given arguments, or SGLang's default, once it is known to be free.

    Raises:
        ValueError: see require_free_port, or the port is no number.
    """
    host, port = given.get("host") or DEFAULT_HOST, _read_port(given.get("port"))
    require_free_port(host, port)
    return f"{host}:{port}"


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
