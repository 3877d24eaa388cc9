"""A real server for tests: started when first asked for, shared by all tests with the same flags.

Registered as a plugin by conftest.py. One server runs at a time, because two would halve each
other's speed on a small machine: keep tests that use the same flags together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_multipole import demo_model
from sglang_multipole.local_server import LocalServer

# 1 to 3 thousand tokens of context are what a test can wait for on a CPU
TEST_FLAGS = ("--max-total-tokens=12288", "--random-seed=1")
READY_SECONDS = 500.0  # below pytest's timeout for one test
MODEL_VARIABLE = "MULTIPOLE_TEST_MODEL"  # a checkpoint to use instead of the demo's model

GetServer = Callable[..., LocalServer]


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The demo's model, made in the user's cache if it is not there."""
    chosen = os.environ.get(MODEL_VARIABLE)
    return Path(chosen) if chosen else demo_model.make(demo_model.default_folder())


@pytest.fixture(scope="session")
def get_server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetServer]:
    """`get_server(*flags)` returns a server that runs with these flags and the model."""
    running: dict[tuple[str, ...], LocalServer] = {}
    folder = tmp_path_factory.mktemp("servers")

    def stop() -> None:
        while running:
            running.popitem()[1].stop()

    def get(*flags: str) -> LocalServer:
        server = running.get(flags)
        if server is None or not server.is_running():
            stop()
            log_path = folder / f"{len(list(folder.iterdir()))}.log"
            server = LocalServer(model_path, [*TEST_FLAGS, *flags], log_path, READY_SECONDS)
            server.__enter__()  # left by stop()
            running[flags] = server
        return server

    try:
        yield get
    finally:
        stop()


@pytest.fixture(scope="session")
def dense_answers(get_server: GetServer) -> dict[str, list[int]]:
    """Greedy tokens of the server without multipole attention.

    Of the whole session: the tests of that server ask for it first, while it runs.
    """
    from tests.server_client import LONG, MIDDLE, SHORT, ask

    server = get_server()
    return {text: ask(server, text)["output_ids"] for text in (SHORT, MIDDLE, LONG)}
