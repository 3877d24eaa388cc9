"""Through a real start: what cannot be served ends with a clear message and nothing running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_multipole.local_server import find_free_port

pytestmark = pytest.mark.server

# enough of a DeepSeek checkpoint for SGLang to see multi-head latent attention
MLA_CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def serve(model_path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_multipole", "serve", "--model-path", str(model_path)]
    return subprocess.run(
        [*command, "--host=127.0.0.1", f"--port={find_free_port()}", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode not in (0, None)
    assert message in output, output[-2000:]
    assert "fired up" not in output


def test_a_malformed_configuration_is_answered_with_an_example(model_path: Path) -> None:
    done = serve(model_path, "--enable-multipole", "--multipole-config", "{token_budget: 1}")
    assert_refused(done, "is not valid JSON")
    assert "example: --multipole-config" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_is_answered_with_the_nearest(model_path: Path) -> None:
    done = serve(model_path, "--enable-multipole", '--multipole-config={"token_buget": 1}')
    assert_refused(done, "did you mean 'token_budget'?")
    assert "Traceback" not in done.stderr


def test_a_feature_that_cannot_be_combined_is_answered_with_the_recipe(model_path: Path) -> None:
    done = serve(model_path, "--enable-multipole", "--enable-deterministic-inference")
    assert_refused(done, "deterministic inference: leave out --enable-deterministic-inference")
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_supported_is_named(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MLA_CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_path / name).read_bytes())
    done = serve(tmp_path, "--enable-multipole", "--load-format=dummy")
    assert_refused(done, "DeepseekV2ForCausalLM has multi-head latent attention (MLA)")
    assert "serve this model without --enable-multipole" in done.stderr


def test_a_server_whose_plugin_is_switched_off_refuses_the_flag(model_path: Path) -> None:
    """Never a dense server in disguise."""
    done = serve(model_path, "--enable-multipole", SGLANG_PLUGINS="__none__")
    assert_refused(done, "unrecognized arguments: --enable-multipole")
