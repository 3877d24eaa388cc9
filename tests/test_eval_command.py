"""The command: table, JSON, baseline, exit codes; against a server in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_multipole import cli
from sglang_multipole.evaluation import command
from sglang_multipole.evaluation.divergence import DenseAnswer
from sglang_multipole.evaluation.reference_file import ReferenceTask, write
from tests.fake_openai import FakeOpenAI, Reply, completion
from tests.word_tokenizer import WordTokenizer

Run = Callable[..., int]


def read_passkey(path: str, body: dict[str, Any]) -> Reply:
    """A model that can do the task."""
    return completion(re.search(r"The pass key is (\d+)", body["messages"][0]["content"])[1])


@pytest.fixture
def replies() -> dict[str, Callable[[str, dict[str, Any]], Reply]]:
    return {"/v1/chat/completions": read_passkey}


@pytest.fixture
def server(replies: dict[str, Any]) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(lambda path, body: replies[path](path, body)) as fake:
        yield fake


@pytest.fixture
def run(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command with a small passkey task, unless other options are given behind."""
    monkeypatch.setattr(command, "ModelTokenizer", lambda path, **kwargs: WordTokenizer())

    def run(*options: str) -> int:
        task = ["--task", "passkey", "--length", "300", "--samples", "4", "--tokenizer", "fake"]
        output = ["--retries", "0", "--json", str(tmp_path / "result.json")]
        return cli.main(["eval", "--base-url", server.base_url, *task, *output, *options])

    return run


def written(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "result.json").read_text())


def test_the_table_and_the_file_have_the_accuracy(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--repeats", "2", "--temperature", "0.5", "--length", "300", "600") == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"passkey .* 4 x 2 .* 100\.0% ± 0\.0%", output)) == 2
    assert "the server reports none" in output
    content = written(tmp_path)
    assert [row["length"] for row in content["tasks"]] == [300, 600]
    row = content["tasks"][0]
    assert (row["accuracy"], row["standard_error"], row["failed"]) == (1, 0, 0)
    assert (row["output_tokens"], row["truncated"], row["max_tokens"]) == (3, 0, 32)
    assert len(row["answers"]) == 8
    assert content["settings"]["seed"] == 42
    assert "api_key" not in content["settings"]


def test_failures_and_truncation_are_counted_and_shown(
    run: Run,
    replies: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter([(500, "out of memory"), completion("1", "length", 32), (400, "[bold]no")])

    def reply(path: str, body: dict[str, Any]) -> Reply:
        return next(answers, None) or read_passkey(path, body)

    replies["/v1/chat/completions"] = reply
    assert run("--concurrency", "1") == 1
    output = capsys.readouterr().out
    assert "passkey: 1 failed" in output
    assert "answered 500: out of memory" in output
    assert "[bold]no" in output
    (row,) = written(tmp_path)["tasks"]
    assert (row["failed"], row["accuracy"], row["truncated"]) == (2, 0.5, 0.5)
    assert [answer["score"] for answer in row["answers"]] == [None, 0, None, 1]


def test_a_task_that_dense_cannot_do_is_no_evidence(
    run: Run,
    replies: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replies["/v1/chat/completions"] = lambda path, body: completion("no")
    assert run() == 0
    weak = tmp_path / "weak.json"
    (tmp_path / "result.json").rename(weak)
    replies["/v1/chat/completions"] = read_passkey
    assert run() == 0
    strong = tmp_path / "strong.json"
    (tmp_path / "result.json").rename(strong)
    capsys.readouterr()

    assert run("--baseline", str(weak)) == 0
    assert "passkey 300: no evidence: dense is right in 0.0%, under 50%" in capsys.readouterr().out
    (row,) = written(tmp_path)["tasks"]
    assert (row["evidence"], row["baseline_accuracy"], row["difference"]) == (False, 0, 1)

    replies["/v1/chat/completions"] = lambda path, body: completion("no")
    assert run("--baseline", str(strong)) == 0
    assert "no evidence" not in capsys.readouterr().out
    (row,) = written(tmp_path)["tasks"]
    assert (row["evidence"], row["difference"]) == (True, -1)
    assert row["difference_standard_error"] == 0

    # other prompts cannot be compared one by one
    assert run("--baseline", str(strong), "--seed", "1") == 0
    (row,) = written(tmp_path)["tasks"]
    assert (row["evidence"], row["difference"]) == (True, None)
    assert "other prompts" in row["note"]
    assert run("--baseline", str(strong), "--length", "400") == 0
    assert written(tmp_path)["tasks"][0]["note"] == "not in the baseline"


def multipole_page(steps: list[int]) -> Callable[[], dict[str, Any]]:
    """/server_info whose sparse steps are read from `steps`."""

    def page() -> dict[str, Any]:
        totals = {"sparse_steps": steps[0], "dense_steps": 1}
        totals |= {"exact_tokens": 20 * steps[0], "context_tokens": 100 * steps[0]}
        report = {"totals": totals, "config": {"token_budget": 128}}
        # a rank without multipole attention adds nothing
        return {"internal_states": [{"multipole": report}, {}]}

    return page


def test_activity_is_what_the_server_counted_meanwhile(
    run: Run,
    server: FakeOpenAI,
    replies: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = [1000]
    server.pages["/server_info"] = multipole_page(steps)

    def reply(path: str, body: dict[str, Any]) -> Reply:
        steps[0] += 5
        return read_passkey(path, body)

    replies["/v1/chat/completions"] = reply
    assert run("--require-multipole") == 0
    assert "20 sparse steps, 0 dense; share of the context read exactly: 20.0%" in (
        capsys.readouterr().out
    )
    content = written(tmp_path)
    assert content["activity"]["share_read"] == pytest.approx(0.2)
    assert content["multipole_config"] == {"token_budget": 128}
    # what was sparse is no baseline
    sparse = tmp_path / "sparse.json"
    (tmp_path / "result.json").rename(sparse)
    assert run("--baseline", str(sparse)) == 2
    assert "decoded sparsely" in capsys.readouterr().err


def test_required_multipole_must_be_there_and_must_have_worked(
    run: Run, server: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--require-multipole") == 1
    assert "start it with --enable-multipole" in capsys.readouterr().err
    assert server.asked == []
    server.pages["/server_info"] = multipole_page([1000])
    assert run("--require-multipole") == 1
    assert "needs sparse steps, got none" in capsys.readouterr().err


@pytest.mark.parametrize("accuracy", ["0", "1"])
def test_divergence_is_measured_where_accuracy_is_no_evidence(
    accuracy: str,
    run: Run,
    replies: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if accuracy == "0":
        replies["/v1/chat/completions"] = lambda path, body: completion("no")
    assert run() == 0
    dense = tmp_path / "dense.json"
    (tmp_path / "result.json").rename(dense)
    top = [[(5, -0.1), (6, -3.0)], [(7, -0.1), (8, -3.0)]]
    reference = tmp_path / "reference.json"
    write(reference, [ReferenceTask("passkey", 300, [DenseAnswer([1, 2], [5, 7], top)])])

    def generate(path: str, body: dict[str, Any]) -> Reply:
        asked = [[[-0.1, 7, None], [-3.0, 8, None]]] * 2
        return 200, {"output_ids": [5, 7], "meta_info": {"output_token_ids_logprobs": asked}}

    replies["/generate"] = generate
    capsys.readouterr()
    assert run("--baseline", str(dense), "--reference", str(reference)) == 0
    measured = written(tmp_path)["divergence"]
    if accuracy == "1":
        assert measured == []
        return
    assert measured[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert measured[0]["identical"] == 1
    assert "against the dense answers" in capsys.readouterr().out


def test_the_reference_is_saved_with_the_prompts_that_were_asked(
    run: Run, replies: dict[str, Any], tmp_path: Path
) -> None:
    def generate(path: str, body: dict[str, Any]) -> Reply:
        length = body["sampling_params"]["max_new_tokens"]
        top = [[[-0.1, 5, None]]] * length
        return 200, {"output_ids": [5] * length, "meta_info": {"output_top_logprobs": top}}

    replies["/generate"] = generate
    path = tmp_path / "reference.json"
    assert run("--save-reference", str(path), "--reference-tokens", "6") == 0
    (task,) = json.loads(path.read_text())["tasks"]
    assert (task["task"], task["length"], len(task["answers"])) == ("passkey", 300, 4)
    assert all(answer["output_ids"] == [5] * 6 for answer in task["answers"])
    assert 200 < len(task["answers"][0]["prompt_ids"]) <= 300 - 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "20"], "passkey: the length must be above 32 tokens"),
        (["--baseline", "absent.json"], "--baseline must be a file"),
        (["--reference", "absent.json"], "--reference must be a file"),
        (["--task", "file"], "give --path"),
        (["--json", "absent/result.json"], "a folder that is there"),
    ],
)
def test_mistakes_are_told_before_any_request(
    run: Run,
    server: FakeOpenAI,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "unknown"], "invalid choice"),
        (["--samples", "0"], "whole number from 1"),
        (["--ops", "0-3"], "numbers from 1"),
        (["--ops", "a"], "numbers from 1"),
        (["--extra-body", "[1]"], "a JSON object"),
    ],
)
def test_wrong_options_are_told(
    run: Run, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*options)
    assert message in capsys.readouterr().err


def test_the_tokenizer_is_that_of_the_server_or_has_to_be_given(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []

    def load(path: str, **kwargs: Any) -> WordTokenizer:
        paths.append(path)
        return WordTokenizer()

    monkeypatch.setattr(command, "ModelTokenizer", load)
    argv = ["eval", "--base-url", server.base_url, "--task", "passkey", "--length", "300"]
    assert cli.main([*argv, "--samples", "1"]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    server.pages["/get_model_info"] = {"model_path": "/models/one"}
    assert cli.main([*argv, "--samples", "1"]) == 0
    assert paths == ["/models/one"]


def test_gsm_symbolic_has_a_row_for_each_number_of_operations(
    run: Run, replies: dict[str, Any], tmp_path: Path
) -> None:
    replies["/v1/chat/completions"] = lambda path, body: completion("none")
    assert run("--task", "gsm_symbolic", "--ops", "1-2,4", "--length", "600") == 0
    names = [row["task"] for row in written(tmp_path)["tasks"]]
    assert names == ["passkey", "gsm_symbolic_op1", "gsm_symbolic_op2", "gsm_symbolic_op4"]


def test_a_task_is_required(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--base-url", server.base_url]) == 2
    assert "give --task, or --reference" in capsys.readouterr().err
