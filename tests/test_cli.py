"""cli: mistakes are told in one line before SGLang is imported; the server gets its flags."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_multipole import cli, demo_model, serve_command, supervisor


@pytest.fixture
def occupied_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(supervisor, "run", run)
    return commands


def test_an_occupied_port_is_one_clear_line(
    occupied_port: int, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "model", "--port", str(occupied_port)]) == 2
    message = capsys.readouterr().err
    assert f"127.0.0.1:{occupied_port} in use" in message
    assert message.count("\n") == 1
    assert started == []


def test_an_occupied_port_in_the_configuration_file_is_seen(
    occupied_port: int, started: list[list[str]], tmp_path: Path
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"model-path: model\nport: {occupied_port}\n")
    assert cli.main(["serve", "--config", str(config)]) == 2
    assert started == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "1"], "a model is required"),
        (["model", "--port", "many"], "the port must be a number"),
        (["model", "--port", "70000"], "the port must be a number"),
        (["model", "--host", "192.0.2.1"], "the address must be one of this machine"),
    ],
)
def test_other_mistakes_are_one_clear_line(
    argv: list[str], message: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *argv]) == 2
    assert message in capsys.readouterr().err
    assert started == []


def test_flags_go_to_the_server_untouched(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "require_free_port", lambda host, port: None)
    flags = ["model", "--enable-multipole", "--multipole-config", '{"token_budget": 256}']
    assert cli.main(["serve", *flags]) == 0
    assert started == [[sys.executable, "-m", "sglang_multipole.server", *flags]]


def test_demo_model_prints_its_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "make", lambda folder: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["demo-model"]) == 0
    assert cli.main(["demo-model", "--folder", "/elsewhere"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert Path(first) == tmp_path / "sglang-multipole" / "SmolLM2-135M-Instruct"
    assert second == "/elsewhere"
