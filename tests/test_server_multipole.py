"""Multipole attention in the real server, on the CPU, with a real model."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_multipole.local_server import LocalServer
from tests.server_client import LONG, MIDDLE, SHORT, TEXT, abandon, ask, flush, state
from tests.server_fixture import GetServer

pytestmark = pytest.mark.server

MIN_CONTEXT = 640
SPARSE = (
    "--enable-multipole",
    "--multipole-config="
    + json.dumps(
        {
            "token_budget": 128,
            "min_context": MIN_CONTEXT,
            "segment_size": 1024,
            "strict_activation": True,
        }
    ),
    "--chunked-prefill-size=512",
)


@pytest.fixture
def server(get_server: GetServer) -> LocalServer:
    return get_server(*SPARSE)


def test_below_the_gate_answers_equal_the_dense_server(
    dense_answers: dict[str, list[int]], server: LocalServer
) -> None:
    answer = ask(server, SHORT)
    assert answer["output_ids"] == dense_answers[SHORT]
    activity = answer["meta_info"]["multipole"]
    assert activity["sparse_steps"] == 0
    assert activity["dense_steps"] == 11
    # every token exactly: the answer's second to twelfth see 6 to 16 tokens
    assert activity["exact_tokens"] == activity["context_tokens"] == sum(range(6, 17))


def test_an_answer_of_one_token_says_that_nothing_was_decoded(server: LocalServer) -> None:
    activity = ask(server, SHORT, 1)["meta_info"]["multipole"]
    assert set(activity.values()) == {0}


def test_above_the_gate_every_step_is_sparse(server: LocalServer) -> None:
    activity = ask(server, LONG)["meta_info"]["multipole"]
    assert activity["sparse_steps"] == 11
    assert activity["dense_steps"] == 0
    # budget 128, recent at most 255, sinks 10
    assert activity["exact_tokens"] <= 11 * (128 + 255 + 10)
    assert activity["context_tokens"] >= 11 * 1200


def test_a_request_that_grows_past_the_gate_becomes_sparse(server: LocalServer) -> None:
    answer = ask(server, MIDDLE, 60)
    prompt = answer["meta_info"]["prompt_tokens"]
    assert MIN_CONTEXT - 50 < prompt < MIN_CONTEXT
    activity = answer["meta_info"]["multipole"]
    # step i sees prompt + i tokens, i from 1
    assert activity["dense_steps"] == MIN_CONTEXT - 1 - prompt
    assert activity["sparse_steps"] == 59 - activity["dense_steps"]


def test_a_second_request_shares_the_clusters_of_a_prefix(server: LocalServer) -> None:
    prefix = TEXT[20000:25500]
    first = ask(server, prefix + " First question?")["meta_info"]
    second = ask(server, prefix + " Second question?")["meta_info"]
    assert second["cached_tokens"] > 1100
    assert first["multipole"]["segments_built"] == 1
    assert second["multipole"]["segments_built"] == 0
    assert second["multipole"]["segments_shared"] == 1


def test_answers_do_not_depend_on_what_else_is_served(server: LocalServer) -> None:
    texts = [LONG, SHORT, MIDDLE, TEXT[9000:13000]]
    alone = [ask(server, text)["output_ids"] for text in texts]
    flush(server)
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: ask(server, text)["output_ids"], texts))
    assert together == alone


def test_the_openai_endpoint_streams_sparse_answers(server: LocalServer) -> None:
    before = state(server)["totals"]["sparse_steps"]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": TEXT[:4500]}],
        "temperature": 0,
        "max_tokens": 6,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    lines = connection.getresponse().read().decode().splitlines()
    assert lines.count("data: [DONE]") == 1
    assert state(server)["totals"]["sparse_steps"] >= before + 5


def test_a_client_that_goes_away_leaves_nothing_behind(server: LocalServer) -> None:
    abandon(server, TEXT[30000:34000])
    deadline = time.monotonic() + 60
    steps = -1
    while steps != (steps := state(server)["totals"]["sparse_steps"]):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(2)
    # the next decode step frees what the aborted request held, and is served
    ask(server, SHORT)
    assert state(server)["pool"]["open"] == 0
    assert ask(server, LONG)["meta_info"]["multipole"]["sparse_steps"] == 11


def test_flush_forgets_every_segment(server: LocalServer) -> None:
    ask(server, LONG)
    flush(server)
    assert ask(server, LONG)["meta_info"]["multipole"]["segments_built"] == 1


def test_server_info_tells_what_is_running(server: LocalServer) -> None:
    report = state(server)
    assert report["enabled"] is True
    assert report["config"]["token_budget"] == 128
    assert report["pool"]["bytes"] > 0
    assert report["build_seconds"] > 0
