"""The server on a GPU with a real model: graphs, page sizes, types, retraction, weights, memory.

Each test starts the servers it needs and takes one to two minutes; they may run side by side, one
process a test (`-k`), as they share a card.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_multipole.local_server import LocalServer
from tests.gpu_servers import (
    MIN_CONTEXT,
    ask,
    ask_together,
    assert_equal_up_to_ties,
    multipole,
    running,
)
from tests.server_client import (
    TEXT,
    abandon,
    activity,
    flush,
    make_other_weights,
    state,
    update_weights,
)

pytestmark = [pytest.mark.gpu, pytest.mark.server]

Record = Callable[[str, Any], None]  # pytest's record_property

# the model has 8192 positions
SHORT = [TEXT[i * 700 : i * 700 + 150 + 300 * i] for i in range(8)]
LONG = [TEXT[9000 * i : 9000 * i + 6000 + 2200 * i] for i in range(8)]
FLASHINFER = ["--dtype=bfloat16", "--attention-backend=flashinfer"]


def assert_sparse(answer: dict[str, Any]) -> None:
    """Every decode step had clusters, but those that mixed chunks took into a prefill."""
    assert answer["meta_info"]["prompt_tokens"] > MIN_CONTEXT
    steps = activity(answer)
    assert steps["sparse_steps"] > 0
    assert steps["dense_steps"] == 0


def assert_served_alone_and_together(
    server: LocalServer, prompts: list[str], record: Record
) -> None:
    """Greedy answers of 32 requests at a time are those of the same requests one at a time."""
    alone = [ask(server, prompt) for prompt in prompts]
    flush(server)
    order = [index for _ in range(4) for index in range(len(prompts))][:32]
    together = ask_together(server, [prompts[index] for index in order])
    same = 0
    for index, answer in zip(order, together, strict=True):
        same += assert_equal_up_to_ties(answer, alone[index])
        if prompts[index] in LONG:
            assert_sparse(answer)
    record("equal", same)
    record("answers", len(order))
    flush(server)


def assert_served_where_steps_can_be_exact(server: LocalServer) -> None:
    """A retracted request's tokens go through prefill again, and mixed chunks take decode steps
    into a prefill: both are exact, so long answers may differ from those of requests alone."""
    alone = [ask(server, prompt) for prompt in SHORT]
    flush(server)
    together = ask_together(server, [*SHORT, *LONG, *LONG])
    for answer, expected in zip(together, alone, strict=False):
        assert_equal_up_to_ties(answer, expected)
    for answer in together[len(SHORT) :]:
        assert_sparse(answer)
    flush(server)


def test_the_default_server_and_its_dense_twin(model_path: Path, record_property: Record):
    with running(model_path, [[*FLASHINFER, *multipole()], FLASHINFER]) as (server, twin):
        before = state(server)["dense_steps"]["below_min_context"]  # the warm-up's
        # below the gate the graphs are the twin's own
        for prompt in SHORT:
            answer, expected = ask(server, prompt), ask(twin, prompt)
            assert answer["meta_info"]["prompt_tokens"] < MIN_CONTEXT
            assert answer["output_ids"] == expected["output_ids"]
            assert activity(answer)["sparse_steps"] == 0
            assert activity(answer)["dense_steps"] == 47
        info = state(server)
        # with overlap scheduling a request that has ended is in one more step
        steps = info["dense_steps"]["below_min_context"] - before
        assert 8 * 47 <= steps <= 8 * 48
        graphs = info["graphs"]
        assert graphs["sparse"]["graphs"] == graphs["dense"]["graphs"] > 4
        assert graphs["sparse"]["seconds"] > 0
        assert info["pool"]["workspace_bytes"] > 0
        assert_served_alone_and_together(server, [*LONG, *SHORT], record_property)
        command = [sys.executable, "-m", "sglang_multipole", "check", "--base-url", server.base_url]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_weights_updated_in_place(model_path: Path, tmp_path: Path, record_property: Record):
    """Answers are those of a server that was started with the new weights, and back again."""
    flags = [*FLASHINFER, *multipole()]
    other_path = make_other_weights(model_path, tmp_path / "other")
    flag_lists = [flags, [*flags, f"--model-path={other_path}"]]
    with running(model_path, flag_lists) as (server, started):
        before = [ask(server, prompt) for prompt in LONG]
        fresh = [ask(started, prompt) for prompt in LONG]
        assert [answer["output_ids"] for answer in before] != [a["output_ids"] for a in fresh]
        same = 0
        for path, expected in ((other_path, fresh), (model_path, before)):
            update_weights(server, path)  # no place is left, so sparse steps have new clusters
            for prompt, wanted in zip(LONG, expected, strict=True):
                answer = ask(server, prompt)
                assert_sparse(answer)
                same += assert_equal_up_to_ties(answer, wanted)
        record_property("equal", same)
        record_property("answers", 2 * len(LONG))
        flush(server)


def test_triton_fp16_pages_and_mixed_chunks(model_path: Path, record_property: Record):
    flags = [
        "--dtype=float16",
        "--attention-backend=triton",
        "--page-size=16",
        "--chunked-prefill-size=512",
        *multipole(dense_backend="triton"),
    ]
    with running(model_path, [flags, [*flags, "--enable-mixed-chunk"]]) as (server, mixed):
        assert_served_alone_and_together(server, [*LONG, *SHORT], record_property)
        assert_served_where_steps_can_be_exact(mixed)


def test_flashinfer_large_pages_and_chunks(model_path: Path, record_property: Record):
    flags = [*FLASHINFER, "--page-size=32", "--chunked-prefill-size=1024"]
    with running(model_path, [[*flags, *multipole()]]) as (server,):
        assert_served_alone_and_together(server, [*LONG, *SHORT], record_property)


def test_retraction_and_clients_that_go_away(model_path: Path):
    environment = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    flags = [*FLASHINFER, "--max-total-tokens=30000", *multipole()]
    with running(model_path, [flags], environment) as (server,):
        assert_served_where_steps_can_be_exact(server)
        for prompt in LONG:
            abandon(server, prompt)
        # its steps free what the abandoned held
        assert_sparse(ask(server, LONG[1]))
        flush(server)
        assert "retract" in server.log_path.read_text().lower()


def test_memory_is_released_and_resumed(model_path: Path):
    flags = [*FLASHINFER, "--enable-memory-saver", *multipole()]
    with running(model_path, [flags]) as (server,):
        before = ask(server, LONG[4])
        flush(server)
        with contextlib.suppress(json.JSONDecodeError):  # answered with an empty body
            server.post("/release_memory_occupation", {"tags": ["kv_cache"]})
        with contextlib.suppress(json.JSONDecodeError):
            server.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        after = ask(server, LONG[4])
        assert after["output_ids"] == before["output_ids"]
        assert activity(after)["segments_built"] > 0
        flush(server)
