"""Servers over two GPUs: tensor-parallel ranks do the same steps, data-parallel ones take turns."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_multipole.local_server import LocalServer
from tests.gpu_servers import ask, ask_together, assert_equal_up_to_ties, multipole, running
from tests.server_client import activity, flush

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

FLAGS = ["--dtype=bfloat16", "--attention-backend=flashinfer", "--enable-metrics"]
TENSOR_PARALLEL = [
    "--tp-size=2",
    "--enable-metrics-for-all-schedulers",
    # it may use multicast objects, which not every host lends
    "--enforce-disable-flashinfer-allreduce-fusion",
]
PROMPT_TOKENS = (300, 1500, 2600, 4000, 5500, 7000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """A small Qwen3 of random weights with 4 KV heads; the demo's model has 3, which 2 do not
    divide."""
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path / name, folder)
    return folder


def prompts() -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.randrange(100, 40000) for _ in range(n)] for n in PROMPT_TOKENS]


def metric_by_rank(server: LocalServer, name: str, label: str) -> dict[str, float]:
    """The metric of each rank, summed over other labels."""
    values: dict[str, float] = {}
    for line in server.get("/metrics").decode().splitlines():
        found = re.match(rf"sglang:multipole_{name}{{(.*)}} (\S+)", line)
        if found:
            rank = re.search(rf'{label}="(\d+)"', found[1])[1]
            values[rank] = values.get(rank, 0.0) + float(found[2])
    return values


def test_tensor_parallel_ranks_do_the_same_steps(
    model: Path, record_property: Callable[[str, int], None]
):
    flag_lists = [
        [*FLAGS, *TENSOR_PARALLEL, *multipole()],
        [*FLAGS, *multipole()],
    ]
    # the single server fills one of the two GPUs, which SGLang would not start over
    environment = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    with running(model, flag_lists, environment) as (server, single):
        pairs = [(ask(server, prompt), ask(single, prompt)) for prompt in prompts()]
        for prompt, (answer, expected) in zip(prompts(), pairs, strict=True):
            # token counts decide what is sparse, on two ranks as on one
            assert activity(answer)["segments_built"] == activity(expected)["segments_built"]
            assert activity(answer)["sparse_steps"] == activity(expected)["sparse_steps"]
            assert activity(answer)["sparse_steps"] == (47 if len(prompt) > 1024 else 0)
        ask_together(server, prompts() * 4)
        for name in ("segments_built_total", "sparse_steps_total", "open_builds_total"):
            values = metric_by_rank(server, name, "tp_rank")
            assert set(values) == {"0", "1"}
            assert values["0"] == values["1"] > 0
        flush(server)
        same = [assert_equal_up_to_ties(answer, expected) for answer, expected in pairs]
        record_property("equal", sum(same))
        record_property("answers", len(same))


def test_data_parallel_ranks_have_pools_of_their_own(model: Path):
    flags = [*FLAGS, "--dp-size=2", *multipole()]
    with running(model, [flags]) as (server,):
        alone = [ask(server, prompt) for prompt in prompts()]
        together = ask_together(server, prompts() * 4)
        for answer, expected in zip(together, alone * 4, strict=True):
            assert_equal_up_to_ties(answer, expected)
        values = metric_by_rank(server, "sparse_steps_total", "dp_rank")
        assert set(values) == {"0", "1"}
        assert min(values.values()) > 0
