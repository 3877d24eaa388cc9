"""The client: every way in which a server can fail ends in the answer, none is dropped."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from sglang_multipole.evaluation import report, runner
from sglang_multipole.evaluation.client import Answer, Client, RequestError, Sampling
from sglang_multipole.evaluation.task import Prompt
from sglang_multipole.evaluation.tasks.passkey import Passkey
from tests.fake_openai import FakeOpenAI, Reply, completion

PROMPT = Prompt("the question", "12345", " The answer is")
SAMPLING = Sampling(0.6, 0.95, 50, {"top_k": 20})


@pytest.fixture
def replies() -> list[Reply]:
    """What the server answers, in order; the last again and again."""
    return [completion("12345", "length")]


@pytest.fixture
def server(replies: list[Reply]) -> Iterator[FakeOpenAI]:
    def reply(path: str, body: dict) -> Reply:
        return replies.pop(0) if len(replies) > 1 else replies[0]

    with FakeOpenAI(reply) as fake:
        yield fake


def make_client(server: FakeOpenAI, **options: object) -> Client:
    return Client(server.base_url, wait_seconds=0.01, **options)


def test_a_chat_request_has_the_prompt_as_a_message(server: FakeOpenAI) -> None:
    answer = make_client(server).ask(PROMPT, SAMPLING, 5)
    assert answer == Answer("12345", "length", 11, 3, answer.seconds)
    ((path, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "fake",
        "messages": [{"role": "user", "content": "the question"}],
        "temperature": 0.6,
        "top_p": 0.95,
        "max_tokens": 50,
        "seed": 5,
        "top_k": 20,
    }


def test_a_completion_begins_with_the_prefix_of_the_answer(server: FakeOpenAI) -> None:
    client = Client(server.base_url + "/v1/", api="completions", model="other")
    assert client.ask(PROMPT, SAMPLING, None).text == "12345"
    ((path, body),) = server.asked
    assert path == "/v1/completions"
    assert body["prompt"] == "the question The answer is"
    assert body["model"] == "other"
    assert "seed" not in body


def test_a_busy_server_is_asked_again_and_no_more_than_allowed(
    server: FakeOpenAI, replies: list[Reply]
) -> None:
    replies[:] = [(503, {"error": "busy"}), (429, "slow down"), completion("x")]
    assert make_client(server, retries=2).ask(PROMPT, SAMPLING, None).text == "x"
    replies[:] = [(500, "broken")]
    server.asked.clear()
    answer = make_client(server, retries=2).ask(PROMPT, SAMPLING, None)
    assert "answered 500: broken" in answer.error
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, "the prompt is too long"), "answered 400: the prompt is too long"),
        ((200, "<html>"), "answered no JSON"),
        ((200, {"choices": []}), "must have choices"),
        ((200, {"error": "none"}), "must have choices"),
    ],
)
def test_a_refusal_is_told_and_not_repeated(
    server: FakeOpenAI, replies: list[Reply], reply: Reply, message: str
) -> None:
    replies[:] = [reply]
    assert message in make_client(server).ask(PROMPT, SAMPLING, None).error
    assert len(server.asked) == 1


def test_a_timeout_fails_once(server: FakeOpenAI, replies: list[Reply]) -> None:
    replies[:] = [(200, 1.0)]
    started = time.monotonic()
    answer = make_client(server, timeout=0.2).ask(PROMPT, SAMPLING, None)
    assert "did not answer within 0.2 s" in answer.error
    assert time.monotonic() - started < 0.9
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    client = Client(url, wait_seconds=0.01, retries=1)
    with pytest.raises(RequestError, match="could not be reached"):
        _ = client.model
    assert "could not be reached" in client.ask(PROMPT, SAMPLING, None).error


def test_thinking_without_an_end_is_an_empty_answer(
    server: FakeOpenAI, replies: list[Reply]
) -> None:
    choice = {"message": {"content": None}, "finish_reason": "length"}
    replies[:] = [(200, {"choices": [choice]})]
    answer = make_client(server).ask(PROMPT, SAMPLING, None)
    assert (answer.text, answer.error, answer.output_tokens) == ("", None, None)


def test_requests_run_together_and_outcomes_are_in_order() -> None:
    def reply(path: str, body: dict) -> Reply:
        time.sleep(0.05)
        question = body["messages"][0]["content"]
        return (400, "no") if question == "1" and body["seed"] == 8 else completion(question)

    prompts = [Prompt(str(number), str(number)) for number in range(4)]
    with FakeOpenAI(reply) as fake:
        outcomes = runner.ask_all(
            make_client(fake),
            Passkey(),
            prompts,
            Sampling(temperature=0.5),
            repeats=2,
            seed=7,
            concurrency=3,
            console=report.make_console(stderr=True),
            title="test",
        )
    assert fake.most_at_once == 3
    assert [(one.sample, one.repeat) for one in outcomes] == [
        (sample, repeat) for sample in range(4) for repeat in range(2)
    ]
    assert [one.score for one in outcomes] == [1, 1, 1, None, 1, 1, 1, 1]
    assert {body["seed"] for _, body in fake.asked} == {7, 8}


def test_a_log_gets_a_line_at_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    console = report.make_console(stderr=True)
    runner.run_all(lambda job: job, range(40), 4, console, "test")
    lines = capsys.readouterr().err.split()
    assert lines == [word for n in range(4, 41, 4) for word in ("test:", str(n), "of", "40")]


def test_a_fault_in_the_work_is_raised() -> None:
    console = report.make_console(stderr=True)
    with pytest.raises(ZeroDivisionError):
        runner.run_all(lambda job: 1 // job, [1, 0, 2], 2, console, "test")
    assert runner.run_all(lambda job: -job, [], 2, console, "test") == []
