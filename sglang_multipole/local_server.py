"""A real server on this machine for as long as a `with` block lasts: for the demo and for tests."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from sglang_multipole import supervisor

HOST = "127.0.0.1"
POLL_SECONDS = 0.5
LOG_LINES_SHOWN = 15


class LocalServer:
    """Starts `sglang-multipole serve` on a free loopback port and waits until it answers.

    Its process ends with the block, whatever ends the block; if this process is killed, the server
    is stopped by the kernel.

    Attributes:
        base_url: for example http://127.0.0.1:40001.
        log_path: everything the server printed.
    """

    def __init__(
        self, model_path: Path, flags: list[str], log_path: Path, ready_seconds: float = 600.0
    ) -> None:
        self.port = find_free_port()
        self.base_url = f"http://{HOST}:{self.port}"
        self.log_path = log_path
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None
        address = ["--host", HOST, "--port", str(self.port)]
        self.command = [
            *(sys.executable, "-m", "sglang_multipole", "serve"),
            *("--model-path", str(model_path), *address, *flags),
        ]

    def __enter__(self) -> LocalServer:
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # a Ctrl-C is for the block, which then stops the server
                    start_new_session=True,
                    preexec_fn=functools.partial(supervisor.die_with_parent, signal.SIGTERM),
                )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all its children; does nothing when it has ended."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(supervisor.STOP_SECONDS + supervisor.REAP_SECONDS + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def is_running(self) -> bool:
        """Whether the server's process is there."""
        return self._process is not None and self._process.poll() is None

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> Any:
        """Send JSON and return the JSON that is answered; urllib's HTTPError if refused."""
        request = urllib.request.Request(
            self.base_url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """Return the body answered to a GET."""
        with urllib.request.urlopen(self.base_url + path, timeout=timeout) as response:
            return response.read()

    def last_log_lines(self) -> str:
        """The end of the log, for a message about a server that did not start."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_seconds
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise RuntimeError(
                    f"local_server: the server must start, got exit code {code}; the end of "
                    f"{self.log_path}:\n{self.last_log_lines()}"
                )
            try:
                # answers 200 once one token has gone through the model
                self.get("/health_generate")
            except OSError:
                time.sleep(POLL_SECONDS)
            else:
                return
        raise RuntimeError(
            f"local_server: the server must be ready within {self._ready_seconds:.0f} s, got no "
            f"answer; the end of {self.log_path}:\n{self.last_log_lines()}"
        )


def find_free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
