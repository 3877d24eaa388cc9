"""`sglang-multipole doctor` and `serve --dry-run`: what would be refused, before a long start."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_multipole import cli, doctor, refusals, serve_command


def findings(iterator) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in iterator}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_multipole", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_versions_are_listed_and_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch" in findings(doctor._versions())["versions"].detail
    monkeypatch.setattr("sglang_multipole.sglang_compat.TESTED_VERSIONS", ("9.9",))
    finding = findings(doctor._versions())["SGLang"]
    assert not finding.is_ok
    assert "must be 9.9, got 0.5.17" in finding.detail


def test_a_plugin_that_sglang_will_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert "must find the entry point 'multipole'" in doctor._entry_point().detail


def test_a_plugin_that_sglang_may_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if not importlib.metadata.entry_points(group=doctor.PLUGIN_GROUP, name=doctor.PLUGIN_NAME):
        pytest.skip("sglang-multipole is not installed here")
    assert doctor._entry_point().is_ok
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert "SGLANG_PLUGINS must name multipole, got 'another'" in doctor._entry_point().detail


def test_an_occupied_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "in use by another process" in doctor._port({"port": str(port)}).detail


def test_what_the_kernels_do_not_do_is_named() -> None:
    import torch

    assert refusals.kernel_problems(torch.bfloat16, 128, 4) == []
    problems = refusals.kernel_problems(torch.float32, 80, 32)
    assert [problem.split(":")[0] for problem in problems] == [
        "dtype torch.float32",
        "head_dim 80, not one of (64, 96, 128, 256)",
        "32 query heads a KV head, at most 16",
    ]


@pytest.mark.parametrize("bad", [0, 2])
def test_the_exit_code_says_whether_a_server_can_be_started(
    bad: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [doctor.Finding(True, "a", "x")] + [doctor.Finding(False, "b", "y")] * bad
    seen: list[list[str]] = []
    monkeypatch.setattr(doctor, "examine", lambda argv: seen.append(argv) or iter(made))
    assert cli.main(["doctor", "--model-path", "m"]) == (1 if bad else 0)
    assert capsys.readouterr().out.startswith("ok    a: x\n" + "FAIL  b: y\n" * bad)
    # the doctor is about multipole attention; a dry run is about the flags as they are
    assert cli.main(["serve", "m", "--dry-run"]) == (1 if bad else 0)
    assert seen == [["--model-path", "m", "--enable-multipole"], ["m"]]


def test_a_dry_run_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda argv: iter(()))
    monkeypatch.setattr(serve_command.supervisor, "run", lambda command: pytest.fail("started"))
    assert cli.main(["serve", "--dry-run"]) == 0


@pytest.mark.server
def test_the_doctor_accepts_what_the_server_accepts(model_path: Path) -> None:
    done = run("doctor", "--model-path", str(model_path), "--port", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok    hooks: all \d+ apply", done.stdout)
    assert "LlamaForCausalLM: 30 layers, 3 KV heads of 64" in done.stdout
    assert "GiB for --max-total-tokens 32768" in done.stdout
    assert done.stdout.endswith("a server can be started\n")


@pytest.mark.server
def test_the_doctor_refuses_what_the_server_refuses(model_path: Path) -> None:
    flags = ["--pp-size", "2", "--enable-lmcache", "--port", "0"]
    done = run("serve", "--dry-run", str(model_path), "--enable-multipole", *flags)
    assert done.returncode == 1
    assert "FAIL  arguments:" in done.stdout
    assert "pipeline parallelism: use --tp-size" in done.stdout
    assert "LMCache: leave out --enable-lmcache" in done.stdout
    assert done.stdout.endswith("1 to be put right\n")


@pytest.mark.server
def test_a_wrong_configuration_is_found_without_a_server(model_path: Path) -> None:
    done = run("doctor", str(model_path), "--multipole-config", '{"events_endpoint": "tcp://*:1"}')
    assert done.returncode == 1
    assert "events_endpoint must be a loopback address" in done.stdout
