"""What tests of servers on a GPU share: starting several, asking, and comparing greedy answers."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_multipole.local_server import LocalServer
from tests import server_client

# small servers that share one card; two runs of cuBLAS on other sizes give other roundings
FLAGS = (
    "--mem-fraction-static=0.8",
    "--max-total-tokens=80000",
    "--cuda-graph-max-bs-decode=32",
    "--disable-prefill-cuda-graph",
    "--grammar-backend=none",
    "--sampling-backend=pytorch",
    "--random-seed=1",
)
MIN_CONTEXT = 1024
CONFIG = {
    "token_budget": 256,
    "min_context": MIN_CONTEXT,
    "strict_activation": True,
    "check_integrity": True,
}
# two logits of a tie differ by a step or two of the 16-bit logits, which are 0.125 apart at 16
TIE_NATS = 0.3
NUM_TOP = 8  # more than two can be equal to the last bit


def multipole(**changes: Any) -> list[str]:
    return ["--enable-multipole", "--multipole-config=" + json.dumps(CONFIG | changes)]


@contextlib.contextmanager
def running(
    model: Path, flag_lists: Sequence[Sequence[str]], environment: dict[str, str] | None = None
) -> Iterator[list[LocalServer]]:
    """Servers with these flags, started side by side; each log goes into MULTIPOLE_TEST_LOGS."""
    folder = Path(os.environ.get("MULTIPOLE_TEST_LOGS") or tempfile.mkdtemp())
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as starting:
        for name, value in (environment or {}).items():
            starting.callback(os.environ.pop, name, None)
            os.environ[name] = value
        servers = []
        for flags in flag_lists:
            number = len(list(folder.glob("*.log")))
            log = folder / f"{os.getpid()}-{number}.log"
            log.touch()
            servers.append(LocalServer(model, [*FLAGS, *flags], log))
        with ThreadPoolExecutor(len(servers)) as pool:
            yield list(pool.map(stack.enter_context, servers))


def ask(server: LocalServer, prompt: str | list[int], num_tokens: int = 48) -> dict[str, Any]:
    """A greedy answer with the likeliest tokens of each step."""
    wanted = {"return_logprob": True, "top_logprobs_num": NUM_TOP, "logprob_start_len": -1}
    return server_client.ask(server, prompt, num_tokens, **wanted)


def ask_together(
    server: LocalServer, prompts: Sequence[str | list[int]], num_tokens: int = 48
) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, num_tokens), prompts))


def assert_equal_up_to_ties(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the tokens are the same; where they first differ, the expected were a tie."""
    pairs = zip(answer["output_ids"], expected["output_ids"], strict=True)
    for index, (token, other) in enumerate(pairs):
        if token != other:
            top = expected["meta_info"]["output_top_logprobs"][index]
            behind = {candidate: top[0][0] - log_prob for log_prob, candidate, _ in top}
            gap = behind.get(token)
            assert gap is not None, f"token {index} is none of the {NUM_TOP} likeliest: {top}"
            assert gap <= TIE_NATS, f"token {index} differs, and was {gap:.3f} nats behind"
            return False
    return True
