"""What operators and authors of programs see of a real server: metrics, log, settings, events."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings

from sglang_multipole import cli
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.event_source import EventSource
from sglang_multipole.local_server import LocalServer, find_free_port
from sglang_multipole.request_settings import RequestSettingsError, token_budget
from tests import server_client
from tests.server_client import LONG, SHORT, TEXT, activity, state
from tests.server_fixture import GetServer
from tests.test_request_settings import near_misses

pytestmark = pytest.mark.server

EVENTS = f"tcp://127.0.0.1:{find_free_port()}"
CONFIG = {
    "token_budget": 128,
    "min_context": 640,
    "segment_size": 1024,
    "strict_activation": True,
    "events_endpoint": EVENTS,
    "events_interval_ms": 100,
    "audit_interval": 4,
}
FLAGS = (
    "--enable-multipole",
    f"--multipole-config={json.dumps(CONFIG)}",
    "--chunked-prefill-size=512",
    "--enable-metrics",
    "--decode-log-interval=4",
)
OTHER = TEXT[9000:14000]


@pytest.fixture
def server(get_server: GetServer) -> LocalServer:
    return get_server(*FLAGS)


def ask(server: LocalServer, text: str, custom_params: Any = None) -> dict[str, Any]:
    sampling = None if custom_params is None else {"custom_params": custom_params}
    return server_client.ask(server, text, sampling=sampling)


def scrape(server: LocalServer) -> dict[str, float]:
    """The samples of sglang:multipole_* by name and reason or state."""
    samples = {}
    for line in server.get("/metrics").decode().splitlines():
        match = re.match(r"sglang:multipole_(\w+)\{(.*)\} (\S+)$", line)
        if match:
            name, labels, value = match.groups()
            assert 'model_name="' in labels
            assert 'tp_rank="0"' in labels
            kind = re.search(r'(?:reason|state|le)="([\w.+]+)"', labels)
            samples[name + (f":{kind[1]}" if kind else "")] = float(value)
    return samples


def rested(server: LocalServer) -> dict[str, float]:
    """The samples once no step is under way."""
    samples: dict[str, float] = {}
    while samples != (samples := scrape(server)):
        time.sleep(1)
    return samples


def refusal(server: LocalServer, path: str, body: dict[str, Any]) -> str:
    """The body of an answer 400."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    assert caught.value.code == 400
    return caught.value.read().decode()


def test_metrics_grow_with_what_is_served(server: LocalServer) -> None:
    ask(server, SHORT)
    before = rested(server)
    assert before["enabled"] == 1
    sparse, dense = activity(ask(server, LONG)), activity(ask(server, SHORT))
    after = rested(server)
    grown = {name: after[name] - before[name] for name in after}
    # with overlap scheduling one step more is under way when a request's last token arrives
    assert sparse["sparse_steps"] == 11
    assert 11 <= grown["sparse_steps_total"] <= 12
    assert dense["dense_steps"] == 11
    assert 11 <= grown["dense_steps_total:below_min_context"] <= 12
    assert grown["segments_built_total"] == sparse["segments_built"] == 1
    assert grown["recluster_seconds_total"] > 0
    report = state(server)
    for name in ("sparse_steps", "exact_tokens", "context_tokens"):
        assert after[f"{name}_total"] == report["totals"][name]
    assert after["pool_bytes"] == report["pool"]["bytes"]
    states = [after[f"pool_places:{state}"] for state in ("free", "sealed", "open", "ordered")]
    assert sum(states) == report["pool"]["places"]


def test_the_audit_measures_live_traffic(server: LocalServer) -> None:
    before = rested(server)
    with EventSource(EVENTS) as source:
        source.wait_until_connected(30)
        answer = ask(server, LONG)
        events = []
        while not any(event["event"] == "request" for event in events):
            events.append(source.next(30))
    audits = [event for event in events if event["event"] == "audit"]
    # every fourth of 11 or 12 steps
    assert 2 <= len(audits) <= 3
    grown = {name: value - before[name] for name, value in rested(server).items()}
    assert grown["audit_mass_covered_count"] >= len(audits)
    for audit in audits:
        assert audit["rid"] == answer["meta_info"]["id"]
        assert audit["layer"] == 15
        assert 0 < audit["relative_error"] < 1
        assert 0.2 < audit["mass_covered"] < 1
    assert state(server)["audit"]["audits"] >= len(audits)
    exact = ask(server, LONG, {"multipole": {"token_budget": 1000}})
    assert activity(exact)["sparse_steps"] == 11
    assert state(server)["audit"]["largest_relative_error"] < 1


def test_the_decode_line_of_the_log_ends_with_what_was_read(server: LocalServer) -> None:
    ask(server, LONG)
    lines = [x for x in server.log_path.read_text().splitlines() if "Decode batch" in x]
    assert lines
    for line in lines:
        # what SGLang's own parser reads comes first, as ever
        assert re.search(r"Decode batch, #running-req: \d+, #token: .*#queue-req: \d+", line)
        assert re.search(r", multipole: sparse \d+/\d+ req, read \d+\.\d %$", line)
    assert any("multipole: sparse 1/1 req" in line for line in lines)


def test_a_request_can_switch_it_off_for_itself(server: LocalServer) -> None:
    plain = ask(server, LONG)
    off = ask(server, LONG, {"multipole": False})
    assert activity(off)["sparse_steps"] == 0
    assert activity(off)["exact_tokens"] == activity(off)["context_tokens"]
    assert activity(plain)["sparse_steps"] == 11
    assert rested(server)["dense_steps_total:switched_off"] >= 11


def test_a_request_can_ask_for_another_budget(server: LocalServer) -> None:
    plain, more = ask(server, LONG), ask(server, LONG, {"multipole": {"token_budget": 512}})
    assert activity(more)["sparse_steps"] == 11
    grown = activity(more)["exact_tokens"] - activity(plain)["exact_tokens"]
    assert 11 * (512 - 128 - 64) <= grown <= 11 * (512 - 128 + 64)


def test_the_settings_of_one_request_change_no_other(server: LocalServer) -> None:
    alone = [ask(server, text)["output_ids"] for text in (LONG, OTHER)]
    work = [(LONG, None), (LONG, {"multipole": False}), (OTHER, None)]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda item: ask(server, *item), work))
    assert [answers[0]["output_ids"], answers[2]["output_ids"]] == alone
    assert [activity(answer)["sparse_steps"] for answer in answers] == [11, 0, 11]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_openai_api_takes_the_settings(server: LocalServer, path: str) -> None:
    prompt = TEXT[:4500]
    what = (
        {"messages": [{"role": "user", "content": prompt}]}
        if "chat" in path
        else {"prompt": prompt}
    )
    body = {"model": "demo", "temperature": 0, "max_tokens": 6, "ignore_eos": True, **what}
    before = rested(server)
    # what the OpenAI client sends for extra_body={"custom_params": {...}}
    server.post(path, body | {"custom_params": {"multipole": False}})
    after = rested(server)
    assert after["dense_steps_total:switched_off"] >= before["dense_steps_total:switched_off"] + 5
    assert after["sparse_steps_total"] == before["sparse_steps_total"]
    message = refusal(server, path, body | {"custom_params": {"multipole": {"token_budget": -1}}})
    assert "whole number of tokens, 0 to 4096" in message


@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ({"multipole": "off"}, "must be true, false or a JSON object, got 'off'"),
        ({"multipole": {"token_budget": 1 << 20}}, "0 to 4096 (the server's max_token_budget)"),
        ({"multipole": {"token_budget": {"deep": [1]}}}, "whole number of tokens"),
        ({"multipole": {"budget": 1}}, "unknown key 'budget'"),
        ("multipole", "custom_params must be a JSON object"),
    ],
)
def test_a_wrong_setting_is_answered_400_and_the_server_goes_on(
    server: LocalServer, custom_params: Any, message: str
) -> None:
    body = {"text": SHORT, "sampling_params": {"custom_params": custom_params}}
    assert message in json.loads(refusal(server, "/generate", body))["error"]["message"]
    assert ask(server, SHORT)["meta_info"]["completion_tokens"] == 12


def is_wrong(custom_params: dict[str, Any]) -> bool:
    try:
        token_budget(custom_params, MultipoleConfig.from_dict(CONFIG))
    except RequestSettingsError:
        return True
    return False


def test_a_thousand_wrong_settings_leave_the_server_answering(server: LocalServer) -> None:
    expected = ask(server, SHORT)["output_ids"]

    @settings(max_examples=1000, deadline=None, database=None)
    @given(near_misses.filter(is_wrong))
    def refuse(custom_params: dict[str, Any]) -> None:
        body = {"text": SHORT, "sampling_params": {"custom_params": custom_params}}
        assert "multipole" in refusal(server, "/generate", body)

    refuse()
    assert ask(server, SHORT)["output_ids"] == expected


def test_a_subscriber_sees_every_request_and_no_gap(server: LocalServer) -> None:
    with EventSource(EVENTS) as source:
        source.wait_until_connected(30)
        answer = ask(server, LONG)
        events = []
        while not any(event["event"] == "request" for event in events):
            events.append(source.next(30))
    numbers = [event["seq"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    request = events[-1]
    assert request["rid"] == answer["meta_info"]["id"]
    assert request["activity"] == activity(answer)
    assert request["completion_tokens"] == 12
    steps = [event for event in events if event["event"] == "step"]
    assert sum(event["sparse_steps"] for event in steps) == 11
    assert state(server)["events"] == {"endpoint": EVENTS, "dropped": 0}


def test_a_subscriber_killed_under_load_disturbs_no_answer(server: LocalServer) -> None:
    expected = ask(server, LONG)["output_ids"]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, server, LONG) for _ in range(4)]
        while not all(answer.done() for answer in answers):
            subscriber = subprocess.Popen(
                [sys.executable, "-m", "sglang_multipole", "top", "--endpoint", EVENTS],
                stdout=subprocess.DEVNULL,
            )
            time.sleep(2)
            subscriber.kill()
            subscriber.wait()
    assert [answer.result()["output_ids"] for answer in answers] == [expected] * 4


def test_check_finds_the_server_active_and_sharing(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--base-url", server.base_url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("ok    active: 7 of 7 steps sparse at 1280 tokens")
    assert lines[2] == "ok    sharing: the second request found 1 segments ready"


@pytest.fixture
def full_budget(get_server: GetServer, tmp_path_factory: pytest.TempPathFactory) -> LocalServer:
    """A budget of the whole context, asked for from SGLang's YAML file and by backend name."""
    path = tmp_path_factory.getbasetemp() / "multipole.yaml"
    path.write_text(
        "decode-attention-backend: multipole\n"
        'multipole-config: \'{"token_budget": 100000, "min_context": 64, "segment_size": 1024}\'\n'
    )
    return get_server("--config", str(path))


def test_a_budget_of_the_whole_context_answers_as_dense(
    dense_answers: dict[str, list[int]], full_budget: LocalServer
) -> None:
    for text, expected in dense_answers.items():
        answer = ask(full_budget, text)
        # float32 on both sides: greedy tokens agree to the last
        assert answer["output_ids"] == expected
        counted = activity(answer)
        assert counted["exact_tokens"] == counted["context_tokens"]
    # known from token counts alone, so nothing is clustered for it
    report = state(full_budget)
    assert report["dense_steps"]["budget_covers"] > 0
    assert report["segments"]["segments_built"] == 0
