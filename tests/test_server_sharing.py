"""Clusters shared, lost and found again in the real server, on the CPU, with a real model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_multipole.local_server import LocalServer
from tests.server_client import (
    LONG,
    SHORT,
    TEXT,
    activity,
    ask,
    make_other_weights,
    state,
    update_weights,
)
from tests.server_fixture import GetServer
from tests.test_server_multipole import SPARSE

pytestmark = pytest.mark.server

PREFIX = TEXT[20000:25500]
# room for two prompts; thinking is stripped of the requests that say they think
SMALL_CACHE = (
    *SPARSE,
    "--max-total-tokens=3072",
    "--strip-thinking-cache",
    "--reasoning-parser=deepseek-r1",
)
# a cluster pool of four places
FEW_PLACES = (
    "--enable-multipole",
    "--multipole-config="
    + json.dumps(
        {"token_budget": 128, "min_context": 640, "segment_size": 4096, "pool_headroom": 1}
    ),
)


@pytest.fixture
def server(get_server: GetServer) -> LocalServer:
    return get_server(*SPARSE)


def assert_nothing_leaked(server: LocalServer) -> None:
    ask(server, SHORT)  # its decode steps free what ended requests held
    pool = state(server)["pool"]
    assert pool["open"] == 0
    assert pool["free"] + pool["sealed"] == pool["places"]


def test_a_shared_prefix_answers_as_an_unshared_one(server: LocalServer) -> None:
    server.get("/flush_cache")
    unshared = ask(server, PREFIX + " What is the second point?")
    assert unshared["meta_info"]["multipole"]["segments_built"] == 1
    server.get("/flush_cache")
    ask(server, PREFIX + " What is the first point?")
    shared = ask(server, PREFIX + " What is the second point?")
    assert shared["meta_info"]["cached_tokens"] > 1100
    assert shared["meta_info"]["multipole"]["segments_shared"] == 1
    assert shared["output_ids"] == unshared["output_ids"]


def test_prompts_that_arrive_together_answer_as_alone(server: LocalServer) -> None:
    """Prefilled side by side, their rows' slots are rewritten behind the first decode step."""
    prompt = TEXT[40000:45500]
    server.get("/flush_cache")
    alone = ask(server, prompt)["output_ids"]
    server.get("/flush_cache")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(server, prompt), range(3)))
    assert [answer["output_ids"] for answer in answers] == [alone] * 3
    assert_nothing_leaked(server)


def test_the_next_turn_of_a_conversation_finds_the_segments_of_the_last(
    server: LocalServer,
) -> None:
    server.get("/flush_cache")
    first = ask(server, PREFIX, 24)
    assert first["meta_info"]["multipole"]["segments_built"] == 1
    second = ask(server, PREFIX + first["text"] + " And what follows from this?", 24)
    assert second["meta_info"]["multipole"]["segments_shared"] == 1
    assert second["meta_info"]["multipole"]["segments_built"] == 0
    assert second["meta_info"]["multipole"]["sparse_steps"] == 23


def test_best_of_four_clusters_the_prompt_once(server: LocalServer) -> None:
    server.get("/flush_cache")
    body = {
        "text": TEXT[50000:55500],
        "sampling_params": {"temperature": 0.8, "n": 4, "max_new_tokens": 8, "ignore_eos": True},
    }
    activities = [answer["meta_info"]["multipole"] for answer in server.post("/generate", body)]
    assert len(activities) == 4
    assert sum(activity["segments_built"] for activity in activities) == 1
    assert sum(activity["segments_shared"] for activity in activities) == 3
    assert all(activity["sparse_steps"] == 7 for activity in activities)


def test_new_weights_with_a_flush_forget_the_old_segments(
    server: LocalServer, model_path: Path, tmp_path: Path
) -> None:
    """A segment of the other weights' keys would give another answer, in either direction."""
    before = ask(server, LONG)["output_ids"]
    update_weights(server, make_other_weights(model_path, tmp_path / "other"))
    other = ask(server, LONG)
    assert activity(other)["segments_built"] == 1
    assert other["output_ids"] != before
    update_weights(server, model_path)
    again = ask(server, LONG)
    assert activity(again)["segments_built"] == 1
    assert again["output_ids"] == before


def test_stripped_thinking_leaves_the_prompts_segments_and_nothing_else(
    get_server: GetServer,
) -> None:
    """SGLang frees the answer's slots at its end and keeps the prompt's in the radix cache."""
    server = get_server(*SMALL_CACHE)
    body = {
        "text": PREFIX,
        "require_reasoning": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
    }
    first = server.post("/generate", body)
    assert first["meta_info"]["multipole"]["segments_built"] == 1
    assert_nothing_leaked(server)
    text = PREFIX + first["text"] + " And what follows from this?"
    second = ask(server, text)
    assert second["meta_info"]["cached_tokens"] <= first["meta_info"]["prompt_tokens"]
    assert second["meta_info"]["cached_tokens"] > 1024
    assert second["meta_info"]["multipole"]["segments_shared"] == 1
    assert second["meta_info"]["multipole"]["dense_steps"] == 0
    server.get("/flush_cache")
    assert ask(server, text)["output_ids"] == second["output_ids"]
    assert_nothing_leaked(server)


def test_a_prefix_that_was_evicted_comes_back_in_other_slots(get_server: GetServer) -> None:
    server = get_server(*SMALL_CACHE)
    prompts = [TEXT[start : start + 4800] for start in (0, 20000, 40000, 60000)]
    first = [ask(server, prompt)["output_ids"] for prompt in prompts]
    again = ask(server, prompts[0])
    assert again["meta_info"]["cached_tokens"] < 100
    assert again["output_ids"] == first[0]
    assert again["meta_info"]["multipole"]["dense_steps"] == 0
    assert_nothing_leaked(server)


def test_more_requests_than_places_are_served_sparsely_or_say_why(get_server: GetServer) -> None:
    server = get_server(*FEW_PLACES)
    before = state(server)
    assert before["pool"]["places"] == 4
    texts = [TEXT[start : start + 3600] for start in range(0, 60000, 10000)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: ask(server, text, 24), texts))
    steps = [activity(answer) for answer in answers]
    # steps are sparse or dense; the first requests to end make room for the others
    assert all(each["sparse_steps"] + each["dense_steps"] == 23 for each in steps)
    assert sum(each["sparse_steps"] == 23 for each in steps) >= 4
    num_dense = sum(each["dense_steps"] for each in steps)
    assert num_dense > 0
    after = state(server)
    grown = after["dense_steps"]["pool_full"] - before["dense_steps"]["pool_full"]
    # with overlap scheduling a request that has ended is in one more step
    assert num_dense <= grown <= num_dense + len(texts)
    assert after["segments"]["orders_without_place"] > 0
    assert activity(ask(server, texts[0], 24))["dense_steps"] == 0
    assert_nothing_leaked(server)


def test_retracted_requests_stay_sparse_and_leak_nothing(
    get_server: GetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers may differ: SGLang prefills again, densely, what was decoded sparsely."""
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    # flags of no other test, since the server runs with this test's environment
    server = get_server(*SPARSE, "--random-seed=7")
    texts = [LONG, TEXT[9000:13500], PREFIX]

    def ask_one(text: str) -> dict[str, Any]:
        return ask(server, text, 30)

    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(ask_one, texts))
    assert server.log_path.read_text().count("Testing retraction. #retracted_reqs: 1") > 0
    for answer in answers:
        assert len(answer["output_ids"]) == 30
        assert answer["meta_info"]["multipole"]["dense_steps"] == 0
    assert_nothing_leaked(server)
