"""The unmodified server on this machine, started by our launcher, without multipole attention."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_multipole import cli
from sglang_multipole.local_server import LocalServer
from tests.server_client import ask
from tests.server_fixture import GetServer

pytestmark = pytest.mark.server


@pytest.fixture
def server(get_server: GetServer) -> LocalServer:
    return get_server()


def test_greedy_generation_answers(server: LocalServer) -> None:
    answer = server.post(
        "/generate",
        {
            "text": "The capital of France is",
            "sampling_params": {"temperature": 0, "max_new_tokens": 4},
        },
    )
    assert answer["text"].startswith(" Paris")
    assert answer["meta_info"]["completion_tokens"] == 4
    assert len(answer["output_ids"]) == 4


def test_the_same_text_gets_the_same_tokens_again(
    dense_answers: dict[str, list[int]], server: LocalServer
) -> None:
    for text, tokens in dense_answers.items():
        assert ask(server, text)["output_ids"] == tokens


def test_concurrent_requests_of_different_lengths(server: LocalServer) -> None:
    def ask_words(num_words: int) -> int:
        body = {
            "text": "word " * num_words,
            "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
        }
        return server.post("/generate", body)["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask_words, [1, 20, 300, 2])) == [3, 3, 3, 3]


def test_the_openai_endpoint_streams_with_the_models_chat_template(server: LocalServer) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{server.base_url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        lines = [line.decode().strip() for line in response]
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert "ello" in "".join(filter(None, deltas))


def test_the_grammar_backend_works_without_a_gpu(server: LocalServer) -> None:
    """The default grammar backend asks for pinned memory and takes the whole server down."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
    }
    answer = server.post(
        "/generate",
        {
            "text": "Name a colour as JSON:",
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": 24,
                "json_schema": json.dumps(schema),
            },
        },
    )
    assert json.loads(answer["text"])["colour"] in ("red", "blue")


def test_a_second_server_on_the_port_is_refused_at_once(
    server: LocalServer, model_path: Path
) -> None:
    done = subprocess.run(server.command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{server.port} in use" in done.stderr


def test_help_shows_the_flags_of_sglang(server: LocalServer) -> None:
    command = [sys.executable, "-m", "sglang_multipole", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "--attention-backend" in done.stdout
    assert "--enable-multipole" in done.stdout


def test_check_says_that_a_dense_server_is_dense(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--base-url", server.base_url]) == 1
    assert "multipole attention is off in this server" in capsys.readouterr().out
