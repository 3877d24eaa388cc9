"""Where the event stream may be offered: on this machine, unless the operator says otherwise."""

from __future__ import annotations

import ipaddress

MAX_PORT = 65535
MAX_IPC_PATH_BYTES = 100  # a Unix socket's name has 108, of which ranks take some
_EXAMPLES = "examples: tcp://127.0.0.1:5570, ipc:///run/multipole.sock"


def check(endpoint: str, allow_remote: bool) -> None:
    """Refuse an address that is none, or that other machines could reach.

    Raises:
        ValueError: says what the address must be.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not endpoint.isprintable():
        raise ValueError(f"must be a tcp:// or ipc:// address, got {endpoint!r}; {_EXAMPLES}")
    if scheme == "ipc":
        if not 0 < len(rest.encode()) <= MAX_IPC_PATH_BYTES:
            raise ValueError(
                f"must name a socket of 1 to {MAX_IPC_PATH_BYTES} bytes, got {endpoint!r}; "
                f"{_EXAMPLES}"
            )
        return
    host, _, port = rest.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) <= MAX_PORT):
        raise ValueError(f"must be tcp://address:port, port 1 to 65535, got {endpoint!r}")
    if not _is_loopback(host) and not allow_remote:
        raise ValueError(
            f"must be a loopback address, got {endpoint!r}: anybody who can reach it reads the "
            "requests' ids and lengths; use 127.0.0.1, or set events_allow_remote to true"
        )


def of_rank(endpoint: str, dp_rank: int | None) -> str:
    """The address of a data-parallel rank: its number is added to the port or the socket's name."""
    if not dp_rank:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}.{dp_rank}"
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + dp_rank}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
