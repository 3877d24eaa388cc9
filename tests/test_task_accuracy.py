"""The benchmark script of tasks, against servers in this process."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import task_accuracy
from sglang_multipole.evaluation import command
from tests.fake_openai import FakeOpenAI, Reply, completion
from tests.test_eval_command import multipole_page, read_passkey
from tests.word_tokenizer import WordTokenizer


def test_servers_one_after_the_other_give_one_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "ModelTokenizer", lambda path, **kwargs: WordTokenizer())
    folder = tmp_path / "results"
    small = [str(folder), "--tasks", "passkey", "--lengths", "300", "--samples", "4"]
    small += ["--reference-tokens", "0"]
    with FakeOpenAI(read_passkey) as dense:
        dense.pages["/model_info"] = {"model_path": "models/fake"}
        assert task_accuracy.main([*small, "--dense", dense.base_url]) == 0
    steps = [0]
    sparse_bodies: list[dict[str, Any]] = []

    def once_wrong(path: str, body: dict[str, Any]) -> Reply:
        sparse_bodies.append(body)
        steps[0] += 5
        return completion("no") if steps[0] == 5 else read_passkey(path, body)

    with FakeOpenAI(once_wrong) as sparse:
        sparse.pages["/model_info"] = {"model_path": "models/fake"}
        sparse.pages["/server_info"] = multipole_page(steps)
        budget = ["--token-budget", "64", "--commit", "abc"]
        assert task_accuracy.main([*small, "--multipole", sparse.base_url, *budget]) == 0
    asked = {"multipole": {"token_budget": 64}}
    assert all(body["custom_params"] == asked for body in sparse_bodies)
    with (folder / "task_accuracy.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["dense_accuracy"], row["multipole_accuracy"]) == ("1.0", "0.75")
    assert (row["difference"], row["evidence"]) == ("-0.25", "True")
    assert row["kl"] == ""
    assert (row["token_budget"], row["commit"]) == ("64", "abc")
    assert int(row["sparse_steps"]) == steps[0]


def test_a_server_whose_requests_fail_makes_no_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "ModelTokenizer", lambda path, **kwargs: WordTokenizer())
    small = [str(tmp_path), "--tasks", "passkey", "--lengths", "300", "--samples", "1"]
    with FakeOpenAI(lambda path, body: (400, "no")) as dense:
        dense.pages["/model_info"] = {"model_path": "models/fake"}
        with pytest.raises(RuntimeError, match="must succeed, got exit code 1"):
            task_accuracy.main([*small, "--reference-tokens", "0", "--dense", dense.base_url])
