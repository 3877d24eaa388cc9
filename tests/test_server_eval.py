"""The evaluation against real servers: a dense one gives the answers, a sparse one is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_multipole import cli
from sglang_multipole.evaluation.tasks.passkey import ANSWER_TOKENS
from tests.server_fixture import GetServer
from tests.test_server_multipole import SPARSE

pytestmark = pytest.mark.server

LENGTH = 1100
NUM_TOKENS = 12  # of a dense answer
TASK = ("--task", "passkey", "--length", str(LENGTH), "--samples", "2")


@pytest.fixture(scope="module")
def dense_files(get_server: GetServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results and the answers of the server without multipole attention."""
    folder = tmp_path_factory.mktemp("dense")
    files = ["--json", str(folder / "dense.json"), "--save-reference", str(folder / "answers.json")]
    url = get_server().base_url
    limit = ["--reference-tokens", str(NUM_TOKENS)]
    assert cli.main(["eval", "--base-url", url, *TASK, *files, *limit]) == 0
    return folder


def test_forced_steps_are_sparse_and_near_the_dense_ones(
    dense_files: Path, get_server: GetServer, tmp_path: Path
) -> None:
    reference = str(dense_files / "answers.json")
    measured = {}
    # the dense server first: it is the noise of the method
    for name, flags in (("dense", ()), ("sparse", SPARSE)):
        path = tmp_path / f"{name}.json"
        url = get_server(*flags).base_url
        command = ["eval", "--base-url", url, "--reference", reference, "--json", str(path)]
        assert cli.main(command) == 0
        (measured[name],) = json.loads(path.read_text())["divergence"]
    dense, sparse = measured["dense"], measured["sparse"]
    assert dense["identical"] == 2
    assert dense["not_forced"] == 0
    assert dense["kl"] < 1e-4
    assert dense["sparse_places"] is None
    assert sparse["places"] + sparse["not_forced"] == dense["places"] > 0
    assert sparse["sparse_places"] == sparse["places"]
    assert 1e-4 < sparse["kl"] < 5


def test_a_sparse_server_is_compared_with_its_dense_twin(
    dense_files: Path, get_server: GetServer, tmp_path: Path
) -> None:
    url = get_server(*SPARSE).base_url
    path = tmp_path / "sparse.json"
    files = ["--json", str(path), "--baseline", str(dense_files / "dense.json")]
    code = cli.main(["eval", "--base-url", url, *TASK, *files, "--require-multipole"])
    assert code == 0
    content: dict[str, Any] = json.loads(path.read_text())
    (row,) = content["tasks"]
    assert row["failed"] == 0
    assert row["note"] == ""
    assert row["difference"] == pytest.approx(row["accuracy"] - row["baseline_accuracy"])
    # the server counts as we do: the prompt fills the length but for a line
    for answer in row["answers"]:
        assert LENGTH - ANSWER_TOKENS - 40 < answer["prompt_tokens"] <= LENGTH - ANSWER_TOKENS
        assert 1 <= answer["output_tokens"] <= ANSWER_TOKENS
    # the first token of an answer comes from prefill; one step may run ahead of its end
    steps = sum(answer["output_tokens"] - 1 for answer in row["answers"])
    assert steps <= content["activity"]["sparse_steps"] <= steps + len(row["answers"])
    assert 0 < content["activity"]["share_read"] < 0.5
    assert content["multipole_config"]["token_budget"] == 128
