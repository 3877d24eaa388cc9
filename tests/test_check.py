"""`sglang-multipole check` believes counters, not flags; here against servers that are made up."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_multipole import check_command, cli
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.local_server import find_free_port

CONFIG = MultipoleConfig(segment_size=2048)


class MadeUp:
    """What a server answers; `activities` in order of the requests."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {"max_req_input_len": 100000, "disable_radix_cache": False}
        self.is_on, self.grows = True, True
        self.sparse_steps = 5
        self.activities = [self.activity(7, 0), self.activity(7, 1)]
        self.prompts: list[list[int]] = []

    @staticmethod
    def activity(sparse: int, shared: int) -> dict[str, int]:
        return {
            "sparse_steps": sparse,
            "dense_steps": 7 - sparse,
            "exact_tokens": 700,
            "context_tokens": 7000,
            "segments_shared": shared,
        }

    def answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if path == "/server_info":
            report = {"config": CONFIG.to_dict(), "totals": {"sparse_steps": self.sparse_steps}}
            state = {"multipole": report} if self.is_on else {}
            return self.info | {"internal_states": [state]}
        self.prompts.append(body["input_ids"])
        activity = self.activities.pop(0)
        self.sparse_steps += activity.get("sparse_steps", 0) if self.grows else 0
        return {"meta_info": {"multipole": activity}}


@pytest.fixture
def made_up() -> MadeUp:
    return MadeUp()


@pytest.fixture
def url(made_up: MadeUp) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any] | None) -> None:
            payload = json.dumps(made_up.answer(self.path, body)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_active_server_that_shares_is_accepted(
    made_up: MadeUp, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--base-url", url + "/"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    configured: token budget 512, exact below 4096 tokens",
        "ok    active: 7 of 7 steps sparse at 4096 tokens, 10.0 % of the context read exactly",
        "ok    sharing: the second request found 1 segments ready",
    ]
    first, second = made_up.prompts
    assert second[:-1] == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "is_on", False), "is off in this server; start it with"),
        (lambda s: setattr(s, "grows", False), "must have grown by 7, got 0"),
        (lambda s: s.activities.__setitem__(0, s.activity(0, 0)), "must be sparse, got"),
        (lambda s: s.activities.__setitem__(1, s.activity(7, 0)), "must find the prefix's"),
        (lambda s: s.info.update(max_req_input_len=2000), "must be 4096 tokens long"),
        (lambda s: s.activities.__setitem__(0, {}), "got no meta_info.multipole"),
    ],
)
def test_what_is_wrong_is_said(
    change: Any, message: str, made_up: MadeUp, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(made_up)
    assert cli.main(["check", "--base-url", url]) == 1
    assert message in capsys.readouterr().out


def test_without_a_radix_cache_nothing_is_shared_and_that_is_no_fault(
    made_up: MadeUp, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.info["disable_radix_cache"] = True
    assert cli.main(["check", "--base-url", url]) == 0
    assert "sharing: none" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{find_free_port()}"
    assert cli.main(["check", "--base-url", url]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"FAIL  {url}/server_info must answer with JSON")
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        MultipoleConfig(segment_size=4096, min_context=0, token_budget=6000),
        MultipoleConfig(segment_size=2048, min_context=640, token_budget=128),
    ],
)
def test_the_prompt_is_long_enough_to_be_sparse_and_sealed(config: MultipoleConfig) -> None:
    length = check_command.prompt_length(config)
    clustered = config.clustered_tokens(length + 1)
    assert clustered > config.token_budget
    assert clustered >= config.segment_size
