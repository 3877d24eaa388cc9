"""The programs of examples/ on a real server: they run, sparsely, and share clusters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from sglang_multipole.local_server import LocalServer
from tests.server_client import TEXT, flush
from tests.server_fixture import GetServer
from tests.test_server_multipole import SPARSE

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parent.parent / "examples"
# one sealed segment of 1024 tokens and a part of the next
DOCUMENT = TEXT[60000:65500]
NUM_TOKENS = 12

Load = Callable[[str], ModuleType]


@pytest.fixture
def server(get_server: GetServer) -> LocalServer:
    server = get_server(*SPARSE)
    flush(server)
    return server


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import an example; answers are cut to NUM_TOKENS, which is what a test can wait for."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        for limit in ("MAX_TOKENS", "MAX_ANSWER_TOKENS"):
            if hasattr(module, limit):
                monkeypatch.setattr(module, limit, NUM_TOKENS)
        return module

    return load


def test_chains_of_thought_share_the_document_and_vote(server: LocalServer, load: Load) -> None:
    result = load("self_consistency").run(server.base_url, DOCUMENT, num_chains=3)
    assert len(result["chains"]) == 3
    assert sum(counters["segments_built"] for counters in result["activity"]) == 1
    assert sum(counters["segments_shared"] for counters in result["activity"]) == 2
    assert all(counters["dense_steps"] == 0 for counters in result["activity"])
    assert result["votes"] == result["answers"].count(result["winner"]) or result["votes"] == 0


def test_samples_are_drawn_and_one_is_chosen(
    server: LocalServer, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    best_of_n = load("best_of_n")
    monkeypatch.setattr(best_of_n.document, "read", lambda path: DOCUMENT)
    result = best_of_n.run(server.base_url, 2)
    assert len(result["answers"]) == 2
    assert result["choice"] in (0, 1)
    assert sum(counters["segments_built"] for counters in result["activity"]) == 1


def test_a_turn_finds_the_clusters_of_the_turns_before(server: LocalServer, load: Load) -> None:
    turns = load("long_conversation").run(server.base_url, DOCUMENT)
    assert len(turns) == 3
    assert [turn["activity"]["segments_built"] for turn in turns] == [1, 0, 0]
    assert [turn["activity"]["segments_shared"] for turn in turns] == [0, 1, 1]
    for before, after in zip(turns, turns[1:], strict=False):
        assert after["cached_tokens"] >= before["prompt_tokens"] - 1
        assert after["activity"]["sparse_steps"] > 0


def test_thinking_ends_at_its_budget_and_the_answer_follows(
    server: LocalServer, load: Load
) -> None:
    parts = load("thinking_budget").run(server.base_url, DOCUMENT, budget=20)
    thinking, answer = parts["thinking"], parts["answer"]
    assert 0 < thinking["tokens"] <= 20
    assert 0 < answer["tokens"] <= NUM_TOKENS
    # the answer continues the thinking, whose KV it finds
    assert answer["prompt_tokens"] > thinking["prompt_tokens"] + thinking["tokens"] - 2
    assert answer["cached_tokens"] >= thinking["prompt_tokens"]
    assert thinking["activity"]["segments_built"] == 1
    assert answer["activity"]["segments_shared"] == 1


def test_the_openai_client_streams_with_settings_of_its_own(
    server: LocalServer, load: Load
) -> None:
    example = load("openai_stream")
    grown = {}
    for name, settings in (("server's", None), ("exact", False), ("more", {"token_budget": 512})):
        before = example.activity.of_server(server.base_url)
        pieces = list(example.stream(server.base_url, DOCUMENT, settings, NUM_TOKENS))
        after = example.activity.of_server(server.base_url)
        assert len(pieces) > 1
        grown[name] = example.activity.grown(before, after)
    assert grown["server's"]["dense_steps"] == grown["more"]["dense_steps"] == 0
    assert grown["exact"]["sparse_steps"] == 0
    assert grown["exact"]["exact_tokens"] == grown["exact"]["context_tokens"]
    assert 0 < grown["server's"]["exact_tokens"] < grown["more"]["exact_tokens"]


def test_the_last_number_of_a_chain_is_its_answer(load: Load) -> None:
    example = load("self_consistency")
    assert example.read_answer("First 2, then 3. The answer is four.") == "4"
    assert example.read_answer("I do not know.") is None
    assert example.vote(["4", None, "2", "4"]) == ("4", 2)
    assert example.vote([None]) == (None, 0)
